"""Asking a trained run: the model on plain transformers, chat, and a picture of what merges.

The Hugging Face export has its place here.
"""
