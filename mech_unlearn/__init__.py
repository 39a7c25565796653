"""mech_unlearn: where does a language model keep a fact, how is it taken out, and is it gone or only hidden?"""
