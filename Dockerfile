# cxrdist for Linux on x86_64: Python 3.11 and the packages of lock.txt, no compiler, no root. How to run it: docs/docker.md.
# CUDA's libraries come with torch's packages; the host gives the driver.

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
# From this version on, pip takes hashes from a constraints file, so that only what is needed of lock.txt is installed.
RUN echo "pip==26.3 --hash=sha256:f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13" > pip.txt \
    && pip install --require-hashes -r pip.txt
COPY lock.txt ./

FROM base AS wheel
RUN pip install --require-hashes -c lock.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY accel_configs accel_configs
COPY cxrdist cxrdist
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

FROM base
ARG EXTRAS=dicom,onnx,app,s3
# The address of another index of torch's packages, for its CPU build or another CUDA release; without it, the locked one.
ARG TORCH_INDEX=
COPY pyproject.toml ./
RUN python -c 'import sys, tomllib; project = tomllib.load(sys.stdin.buffer)["project"]; \
    extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",") if name]; \
    print(*project["dependencies"], *sum(extras, []), sep="\n")' "$EXTRAS" < pyproject.toml > needs.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
        grep -oE '^(torch|torchvision)==[^ ]+' lock.txt > torch.txt \
        && pip install --index-url "$TORCH_INDEX" -r torch.txt; \
    fi \
    && pip install --require-hashes -c lock.txt -r needs.txt
# Everything above is reused as long as the dependencies are the same: a change of the code is a layer of two megabytes.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl \
    && useradd --create-home --uid 1000 cxrdist \
    && chmod 1777 /home/cxrdist
# With `docker run --user` the user may have no name and no home: libraries that keep caches ask for both.
ENV HOME=/home/cxrdist USER=cxrdist NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /project
ENTRYPOINT ["cxrdist"]
CMD ["--help"]
