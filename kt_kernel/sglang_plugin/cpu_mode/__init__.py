"""Stock SGLang without a GPU: what its CPU engine lacks for DeepSeek V3.2."""
