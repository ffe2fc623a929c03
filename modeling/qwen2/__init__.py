"""Qwen2 decoder with understanding and generation experts."""
