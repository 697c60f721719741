"""Run ``neuronscope demo``: show on scikit-learn's digits that neurons die with ReLU but not with GELU and SiLU."""
