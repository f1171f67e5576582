"""Tables of the mutation tests: the tests that cover a file, and the mutants that do not change the behaviour."""

UNIT = "tests/unit/test_"
COVER = {
    "methods/losses": "losses baseline_losses reference_values",
    "methods/nearest_mean": "method_losses proxies",
    "methods/base": "method_losses analytic",
    "methods/afc": "method_losses proxies",
    "methods/analytic": "analytic evidence method_losses",
    "methods/sums_head": "analytic evidence sums_heads method_losses",
    "methods/feature_sums": "analytic evidence sums_heads",
    "methods/evidence": "evidence",
    "methods/derpp": "method_losses",
    "methods/wa": "method_losses",
    "methods/kernel": "kernel method_losses",
    "methods/landmarks": "kernel",
    "methods/row_blocks": "kernel",
    "methods/memo": "memo method_losses method_needs",
    "methods/foster": "foster method_needs method_losses",
    "models/branches": "memo",
    "models/booster": "foster",
    "models/encoders/adapters": "adapters",
    "methods/slda": "sums_heads",
    "methods/ncm": "sums_heads",
    "methods/ranpac": "sums_heads method_losses",
    "methods/air": "sums_heads method_losses",
    "methods/icarl": "method_losses reference_values",
    "methods/lwf": "method_losses reference_values",
    "methods/ssil": "method_losses reference_values",
    "methods/avcil": "method_losses reference_values",
    "data/plan": "plan foreign_methods",
    "data/shuffle": "shuffle plan",
    "data/clip_weights": "foreign_methods",
    "data/exemplar_memory": "exemplar_memory",
    "streams/commit": "artifact stream_state",
    "streams/artifact": "artifact stream_state",
    "streams/exemplar_logits": "artifact end_of_step",
    "streams/metrics": "metrics compare",
    "streams/identity": "stream_state artifact resume",
    "streams/stream": "stream_state chain",
    "streams/compat": "stream_state",
    "training/optim": "optim",
    "training/teacher": "teacher train_step",
    "training/teacher_cache": "teacher",
    "training/inference_pass": "inference_batches end_of_step network_mode teacher",
    "training/closed_form": "end_of_step foreign_device",
    "training/exemplars": "end_of_step",
    "training/exemplar_logits": "end_of_step",
    "training/sampling": "foreign_methods",
    "training/preflight": "preflight modalities",
    "training/train_step": "train_step trainer",
    "training/snapshot": "trainer",
    "training/trainer": "trainer",
}
TESTS = {f"avcil_dist/{file}.py": [f"{UNIT}{name}.py" for name in names.split()] for file, names in COVER.items()}

# (file, part of the line, change): the reason why no result depends on it
EQUIVALENT = {
    ("training/inference_pass", "torch.zeros(0, 0)", "torch.zeros(0, 0) -> torch.zeros(0, 0)"): "equal arguments",
    (
        "training/train_step",
        "gather_batch(",
        "gather_batch(batch, output, teacher_output, stored=self.stored, num_bad=self.num_bad) -> "
        "gather_batch(batch, output, teacher_output, stored=self.stored)",
    ): "the batch is counted instead, which waits for the device",
    (
        "methods/nearest_mean",
        "F.normalize(features.double()",
        "F.normalize(features.double(), dim=1) -> F.normalize(features.double())",
    ): "1 is the default",
    (
        "methods/nearest_mean",
        "none = ",
        "torch.full((dim,), torch.nan, dtype=torch.float64) -> torch.full((dim,), torch.nan)",
    ): "the stack is in float64 if any mean is, and the result in float32",
    ("methods/evidence", "zip(blocks, alphas", "True -> False"): "there are as many precisions as blocks",
    (
        "methods/evidence",
        "free = ",
        "1e-06 -> 0.500002",
    ): "the constant determines one more number: N exceeds the sum by it",
    (
        "methods/evidence",
        "CONVERGED:",
        "(alphas.log() - previous.log()).abs().max() < CONVERGED -> "
        "(alphas.log() - previous.log()).abs().max() <= CONVERGED",
    ): "no change is the limit to the last digit",
    ("methods/kernel", "zip(*self._collected", "True -> False"): "each entry is a pair",
    ("data/shuffle", "where=shifted > count", "shifted > count -> shifted >= count"): "count is reflected to itself",
    ("data/plan", "range(1, global_batch + 1)", "1 -> 2"): "of the end: no batch is divided by the next number",
    (
        "data/plan",
        "padded = ",
        "np.full(num_batches * global_batch, PADDING, dtype=np.int64) -> np.full(num_batches * global_batch, PADDING)",
    ): "the default for an integer",
    ("data/exemplar_memory", "np.where(lengths > 0", "1 -> 2"): "the divisor of rows of zeros",
    ("streams/metrics", "zip(others, counts", "True -> False"): "np.unique returns as many counts as values",
    (
        "training/closed_form",
        "hits = ",
        "torch.zeros(len(candidates), dtype=torch.long, device=step.device) -> torch.zeros(len(candidates), "
        "device=step.device)",
    ): "float32 is exact for less than 16 million clips",
}


def is_equivalent(file: str, line: str, change: str) -> bool:
    """Whether a change of a line is in `EQUIVALENT`."""
    return any(file == f"avcil_dist/{name}.py" and part in line and change == known for name, part, known in EQUIVALENT)
