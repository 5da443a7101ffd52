"""Pure functions on tensors: gated retention, attention, rotary embedding and normalisation."""
