# The one image of the head, the workers and the submitter: this project and what it needs, locked.
#   make image
# The base brings Python and nothing of CUDA: torch's wheels hold that already.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# Dependencies change rarely, and are most of the bytes: a layer of their own, before any code.
FROM ${BASE_IMAGE} AS dependencies
COPY requirements-image.lock /
RUN python3.11 -m venv /opt/pneumo \
 && /opt/pneumo/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes \
    -r /requirements-image.lock \
 && /opt/pneumo/bin/pip uninstall --yes --quiet pip

FROM ${BASE_IMAGE}
# wget is called by the probes of older KubeRay; ssh and rsync by Ray's launcher, which fills
# containers of VMs so, and by the autoscaler of its head, which starts the workers from inside one.
# gcc is called by torch.compile.
# The launcher's shells are login shells, whose /etc/profile forgets ENV PATH; the folder of its token
# would be root's if mounting the token made it.
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    gcc libc6-dev openssh-client rsync wget > /dev/null \
 && rm -rf /var/lib/apt/lists/* \
 && { python3.11 -m pip uninstall --yes --quiet pip setuptools wheel 2> /dev/null || true; } \
 && useradd --uid 1000 --gid 100 --create-home --home-dir /home/pneumo pneumo \
 && install -d -m 700 -o 1000 -g 100 /home/pneumo/.ray \
 && echo 'PATH=/opt/pneumo/bin:$PATH' > /etc/profile.d/pneumo.sh
COPY --from=dependencies /opt/pneumo /opt/pneumo
# The checkout's umask may hide its files from all but their owner.
COPY --chown=1000:100 pneumo /app/pneumo
COPY --chown=1000:100 jobs /app/jobs
# GKE's device plugin mounts the driver of its Container-Optimized OS at LD_LIBRARY_PATH; elsewhere
# nothing lies there.
# HOME is said here too, for the launcher reads it from the image and takes /root else.
ENV PATH=/opt/pneumo/bin:$PATH \
    HOME=/home/pneumo \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/pneumo
USER 1000:100
ARG VERSION=0.1.0
ARG REVISION=unknown
ENV PNEUMO_REVISION=${REVISION}
LABEL org.opencontainers.image.title="pneumo" \
      org.opencontainers.image.description="Training and evaluation of a pneumonia classifier on chest X-rays. Research use only." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
CMD ["python", "-m", "jobs.train", "--help"]
