"""SigLIP as a NaViT: pictures of any size, packed."""
