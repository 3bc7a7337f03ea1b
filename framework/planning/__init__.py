"""What a config needs: parameters, bytes, FLOPs and collectives, without training."""
