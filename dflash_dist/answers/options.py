"""What `regenerate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dflash_dist.config import Day, Dtype
from dflash_dist.options import AnswerOptions, JsonObject, option

SERVER = "answers from a server (key: OPENAI_API_KEY)"
MOST_CONNECTIONS = 1000  # that the client of a server opens


@dataclass(frozen=True, kw_only=True)
class RegenerateOptions(AnswerOptions):
    target: str = option("model folder or hub id; with --endpoint its name there")
    trust_remote_code: bool = option("run Python code that the target brings", False)
    prompts: str = option("conversations; their answers are written again")
    out: Path = option("JSONL to write")
    max_bad_rows: int = option("prompts that may be unusable, and are left out", 0)
    batch_size: int = option("conversations generated at once", 24)
    dtype: Dtype = option("", "bfloat16")
    template_args: JsonObject = option("JSON object for the chat template", {})
    date: Day | None = option(
        "the day that the chat template writes (YYYY-MM-DD); default: that on which the run began", None
    )
    endpoint: str | None = option("URL of an OpenAI-compatible server, such as http://localhost:8000/v1", None, SERVER)
    concurrency: int = option("requests in flight", 64, SERVER)
    wait: float = option("how long to wait for a server that does not answer yet [s]", 900.0, SERVER)
    timeout: float = option("longest wait for one answer [s]", 600.0, SERVER)
    retries: int = option("how often a failed request is sent again", 8, SERVER)
    give_up: bool = option("leave out rows that every retry failed to answer", False, SERVER)
    extra_body: JsonObject = option("further JSON fields of every request", {}, SERVER)

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {self.endpoint} is no URL: expected one such as http://localhost:8000/v1")
        if self.endpoint and self.date:
            raise ValueError(f"--date {self.date}: a server writes the day that its own clock says; leave it out")
        if not 1 <= self.concurrency <= MOST_CONNECTIONS:
            raise ValueError(
                f"--concurrency {self.concurrency}: between 1 and {MOST_CONNECTIONS}; more by further ranks"
            )
        if self.retries < 0 or self.timeout <= 0:
            raise ValueError(
                f"--retries {self.retries} and --timeout {self.timeout:g} must not be below 0, nor --timeout 0"
            )
