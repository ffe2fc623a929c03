"""Segment Anything (arXiv 2304.02643): image encoder, prompt encoder and mask decoder under Hugging Face's parameter names."""
