"""Who made a bundle: keys, signatures, whom to trust, and the records of what was removed.

keys makes and opens private keys, owners reads a trust file, signing signs and checks envelopes, records is about what
was removed. Needs the extra ``sign``; what it signs is bundle/signatures.py's.
"""
