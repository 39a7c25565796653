"""What a method gives back: changes of weights and interventions, put in force for a while, saved and exported."""
