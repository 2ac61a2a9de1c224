"""The inner parts of the torch engine. They need torch, transformers and safetensors alone."""
