"""Turn texts into vectors on disk, with any ``nn.Module`` and any tokenizer.

The road: ``corpus`` reads texts, ``batching`` cuts them into token-budget batches, ``embedder`` runs the model over
them, ``pooling`` and ``head`` make one vector of each text's hidden states, ``store`` keeps vectors and searches them;
``settings`` says how, ``rows`` is what travels between them. This room knows neither residency nor how models are
loaded: an embedder is given a module and, if need be, a runner.
"""
