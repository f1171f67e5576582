"""Audio-guided attention: the module, its fused forward and backward pass, and kernels for each device."""
