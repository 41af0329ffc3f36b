# syntax=docker/dockerfile:1
# An image with starmerge as its command, for processors alone or with CUDA:
#   docker build -t starmerge .
#   docker build -t starmerge:cuda --build-arg TORCH=cu128 .
# docs/operation.md says how it is run.
ARG PYTHON=3.13.5-slim-bookworm

FROM python:${PYTHON} AS build
# Which builds of torch are installed, as uv names them: cpu, cu126, cu128, ...
ARG TORCH=cpu
# Extras of pyproject.toml, separated by commas.
ARG EXTRAS=eval,gguf,remote
RUN pip install --no-cache-dir uv==0.13.8
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The image's own Python, and copies in place of links: the cache is no part of the image.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --no-managed-python /opt/starmerge \
    && uv pip install --link-mode copy --python /opt/starmerge/bin/python \
        --torch-backend "${TORCH}" ".[${EXTRAS}]"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="starmerge" \
    org.opencontainers.image.description="Merge fine-tuned models of one base" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --user-group --create-home starmerge \
    && install --directory --owner starmerge --group starmerge /cache /scratch /models
COPY --from=build /opt/starmerge /opt/starmerge
# Under /cache lie the Hub's cache (/cache/huggingface) and starmerge's own; /scratch has what is
# written for a while. The two NVIDIA variables mean something to its container runtime alone.
ENV PATH=/opt/starmerge/bin:${PATH} \
    XDG_CACHE_HOME=/cache \
    TMPDIR=/scratch \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can tell that it is not root.
USER 1000:1000
VOLUME ["/cache", "/scratch"]
WORKDIR /models
ENTRYPOINT ["starmerge"]
CMD ["--help"]
