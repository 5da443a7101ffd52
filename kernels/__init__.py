"""Pure functions on tensors: retention, attention, rotary embedding, norms, matrix products."""
