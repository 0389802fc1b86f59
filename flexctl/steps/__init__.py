"""What several commands do, above the libraries and below the engine.

Where bundles are (sources, anchored), what models run on (machine), what an owner says of their text (terms), router
rows (router_rows, overlap), training an expert (expert_run, open_run, private_run, guarantee, outlook), changing a
merged model (change), checking all of a bundle (proof), a bundle that answers (answering), whom to trust (trusting,
passphrase), records of what went (removal), looking at experts from outside (screening). What a step needs of a
command's Config is a Protocol beside it.
"""
