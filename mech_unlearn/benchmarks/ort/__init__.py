"""ORT: the same facts asked in five forms, to see whether forgetting depends on the form."""
