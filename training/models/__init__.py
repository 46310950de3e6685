"""The pretrained networks: configs, loading, encoding, quantization, attention, compilation."""
