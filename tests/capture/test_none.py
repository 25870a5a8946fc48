from userspace_proxy.capture.base import Changes
from userspace_proxy.capture.none import NoCapture
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName


def test_takes_everything_and_does_nothing(run):
    async def main():
        capture = NoCapture()
        await capture.start()
        portal = Portal(IPFamily.IPV4, Protocol.TCP, "127.96.0.10", 80, PortalKind.CLUSTER_IP)
        assert await capture.replace([Redirect(portal, 20000, ServicePortName("default", "web"))]) == Changes()
        await capture.withdraw()
        await capture.close()
        assert not capture.rewrites_destination

    run(main())
