"""From scores to a label per fact and to claims about lists, with error rates from models whose truth is known."""
