# No card: the demo, and every command that plans. From the root of the clone:
#   docker build -f docker/cpu.Dockerfile -t orchestrator:cpu .
#   docker run --shm-size=1g orchestrator:cpu
# PyPI's torch brings CUDA's libraries along; PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can name CPU builds instead.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE}
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /opt/orchestrator
# What changes rarely comes first: torch, the other packages, and the code last of all.
COPY constraints.txt ./
RUN python3 -m venv /opt/venv && pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY orchestrator/__init__.py orchestrator/
RUN DS_BUILD_OPS=0 pip install -c constraints.txt -e . \
    && useradd --create-home --uid 10001 --user-group trainer \
    && install -d -o trainer -g trainer runs /cache
COPY conf conf
COPY launch launch
COPY orchestrator orchestrator
USER 10001:10001
HEALTHCHECK --interval=5m --timeout=30s --start-period=1m CMD ["python", "launch/doctor.py"]
# The demo: ZeRO-3 with everything in host memory, on two processes.
ENV LOCAL_SIZE=2
CMD ["deepspeed", "launch/train.py", "zero=stage3", "offload=cpu", "run.dir=runs/demo", "run.epochs=15"]
