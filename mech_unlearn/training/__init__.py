"""The one training loop that methods share: objective, schedule, what acts beside the loss; no method lives here."""
