"""Pure functions of tensors: attention, rotary positions, patches, flow, boxes."""
