"""The plain way to sample on-policy, whole rounds at a time: what a source with staleness 0 has to equal."""

from __future__ import annotations

from rl.types import ALONE, Call, ScoredGroup
from rollout.prompts import deal, sampling_seed
from rollout.weight_sync import publish


class OnPolicySource:
    """Samples every group with the newest weights."""

    def __init__(self, engine, scorer, stream, sampling, *, dynamic, team=ALONE, **sync):
        self.engine, self.scorer, self.stream, self.sampling = engine, scorer, stream, sampling
        self.dynamic, self.team, self.sync = dynamic, team, sync
        self.cursor, self.policy_version = 0, 0
        self.last_counts: dict[str, float] = {}
        self.last_rejected: list[ScoredGroup] = []

    def groups(self, num_groups):
        share = num_groups // self.team.size
        kept: list[ScoredGroup] = []
        rejected: list[ScoredGroup] = []
        rounds = 0
        while True:
            wanted = self.team.gather(share - len(kept))
            if not any(wanted) or rounds == self.dynamic.max_rounds:
                break
            rounds += 1
            scored = self._sample(wanted)
            passing = [self.dynamic.keep_fn(group) for group in scored]
            kept += [group for group, passes in zip(scored, passing, strict=True) if passes]
            rejected += [group for group, passes in zip(scored, passing, strict=True) if not passes]
        missing = share - len(kept)
        self.last_counts = {
            "rounds": float(rounds),
            "replaced": float(len(rejected) - missing),
            "sampled_tokens": float(sum(len(c.token_ids) for g in kept + rejected for c in g.completions)),
        }
        self.last_rejected = rejected[missing:] if missing else rejected
        yield from kept + rejected[:missing]

    def _sample(self, wanted):
        ordinals = deal(self.cursor, wanted)[self.team.rank]
        self.cursor += sum(wanted)
        if not ordinals:
            return []
        asked = self.sampling
        prompts = tuple(self.stream.at(n) for n in ordinals)
        seeds = tuple(sampling_seed(asked.seed, n) for n in ordinals)
        call = Call(prompts, asked.group_size, asked.params, seeds, asked.with_logprobs)
        return self.scorer.score(self.engine.generate(call))

    def yield_device(self):
        return

    def publish(self, weights, *, version):
        report = publish(self.engine, weights, version=version, team=self.team, **self.sync)
        self.policy_version = version
        return report.metrics | report.canary_metrics

    def settle(self):
        return

    def close(self):
        self.scorer.close()
        self.engine.close()
