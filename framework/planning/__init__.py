"""Plan a config without training: parameters, bytes, FLOPs and collectives of each device."""
