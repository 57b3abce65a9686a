"""An engine as somebody else would write it: what the Engine protocol names, and nothing else of ours."""

from __future__ import annotations


class ProtocolEngine:
    """Hands every call on to another engine."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self.name, self.tensors = "somebody's", engine.tensors
        self.runs_alone = self.held_while_training = self.sleeps_while_training = False

    @property
    def version(self):
        return self._engine.version

    @property
    def in_flight(self):
        return self._engine.in_flight

    def submit(self, call):
        self._engine.submit(call)

    def collect(self, *, timeout_s):
        return self._engine.collect(timeout_s=timeout_s)

    def abort(self, prompts):
        self._engine.abort(prompts)

    def generate(self, call):
        return self._engine.generate(call)

    def hold(self, *, release=False):
        self._engine.hold(release=release)

    def update_weights(self, weights, *, version):
        self._engine.update_weights(weights, version=version)

    def adopt(self, version):
        self._engine.adopt(version)

    def fingerprints(self):
        return self._engine.fingerprints()

    def prompt_logprobs(self, token_ids):
        return self._engine.prompt_logprobs(token_ids)

    def close(self):
        self._engine.close()
