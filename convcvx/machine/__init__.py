"""What the machine offers: threads, memory, devices, compiled kernels."""
