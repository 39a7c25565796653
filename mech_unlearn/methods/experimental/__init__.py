"""Methods without evidence of their own; they stay in `METHODS` and keep the contract of all others.

Two grounds lead here. The formula is ours, because the paper or its code could not be read: what such a method does
here says nothing about the paper's. Or the method does nothing in experiment 002 on either world: recall on the forget
set stays within .05 of the full model's with the settings that the search chose.

catnip                   ours: a working form after the abstract
klue                     ours: attribution, share and superficial contexts are a working definition
sae_iru                  ours: the loss of the paper is not public (with `iru_bands`, its measure of distance)
shred                    ours: how far to demote, how much, among how many tokens
srmu                     ours: ratio, clipping, moving mean and gate
knowledge_neuron_erase   nothing: .98 and 1.00 of the answers stay (biographies, wikidata)
ssd                      nothing: 1.00 and 1.00 stay at all six settings; on planted units it hits the right ones
"""
