"""Which experts of each layer the GPU keeps: how often each was used, and the most used first."""
