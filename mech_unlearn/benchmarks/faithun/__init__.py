"""FaithUn: is forgetting superficial, too little (paraphrases, several hops) or too much (same answer elsewhere)?"""
