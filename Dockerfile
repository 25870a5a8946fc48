# syntax=docker/dockerfile:1
#
# As it is, the image runs as nobody in particular and serves addresses that the host has (--capture=auto settles for
# local); those of a cluster take --cap-add NET_ADMIN as root:
#
#     docker run --network host -v ./manifests:/manifests:ro userspace-proxy --manifests /manifests
#
# To capture by iptables it must be root in the host's network, and share the lock that all of the host's
# iptables users take:
#
#     docker run --network host --user 0 --cap-add NET_ADMIN --cap-add NET_RAW -v /run/xtables.lock:/run/xtables.lock \
#         -v ./manifests:/manifests:ro userspace-proxy --manifests /manifests

FROM python:3.11-slim-bookworm AS build
# python-iptables has no wheel, so it is compiled.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY userspace_proxy userspace_proxy
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
# iptables brings the libraries that python-iptables loads; kmod, the modprobe that it calls.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables kmod \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels userspace-proxy
USER 65532:65532
# Health and metrics; the latter listen on loopback unless --metrics-bind-address says otherwise.
EXPOSE 10256 10249
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:10256/livez', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["userspace-proxy"]
