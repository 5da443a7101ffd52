"""Reads lm-eval result files and draws tables and figures from them."""
