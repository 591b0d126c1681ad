"""Models: SDXL-inpainting and its parts opened, attention, LoRA, the remover in use."""
