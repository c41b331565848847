"""The paper's figures for the model at hand: what is measured, the heads, the stages.

For ``offramp figures``.
"""
