"""What closed-form writes share: keys, what must stay, values and affine maps; no method lives here."""
