"""The demonstration behind ``neuronscope demo``: ReLU dies where GELU and SiLU do not, on scikit-learn's digits."""
