"""The train state and the compiled steps: training, evaluation, prediction, guard and average."""
