//! Real DRBD 8.4 between both hosts: what the probe says of it, and what `remus protect` does with a guest on it.

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::protection::disks::{BACKING, WithDisk, backing};
use crate::protection::{PATIENCE, protect, start_daemons};
use crate::wait::wait_until;

pub(super) const DRBD: Scenario = Scenario {
    name: "disk-drbd",
    about: "a guest on a connected pair of DRBD 8.4: the probe tells protocols and states apart, protecting is refused with the reason and the way out",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

const RESOURCE: &str = "resource r0 {
  device /dev/drbd0;
  disk /dev/loop0;
  meta-disk internal;
  net { protocol C; }
  on hosta { address 10.77.0.1:7790; }
  on hostb { address 10.77.0.2:7790; }
}";

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    start_daemons(pair)?;
    pair.each(|host| {
        backing(host)?;
        host.sh(&format!(
            "modprobe drbd && losetup /dev/loop0 {BACKING} && echo 'global {{ usage-count no; }}' >/etc/drbd.d/global_common.conf && \
             echo '{RESOURCE}' >/etc/drbd.d/r0.res && drbdadm create-md --force r0 && drbdadm up r0"
        ))
        .map(drop)
    })?;
    a.sh("drbdadm primary --force r0")?;
    wait_until(PATIENCE, "both copies of the DRBD are up to date", || {
        Ok(a.sh("cat /proc/drbd")?.contains("ds:UpToDate/UpToDate").then_some(()))
    })?;
    ctx.note(a.sh("grep ' 0: ' /proc/drbd")?.trim());

    probe(a, "/dev/loop0", 1, "")?;
    for protocol in ["A", "B", "C"] {
        pair.each(|host| host.sh(&format!("drbdsetup net-options {} --protocol={protocol}", ends(host))).map(drop))?;
        probe(a, "/dev/drbd0", 3, &format!("protocol {protocol}"))?;
        probe(b, "/dev/drbd0", 3, &format!("protocol {protocol}"))?;
    }
    a.sh("mknod /tmp/drbd7 b 147 7")?;
    probe(a, "/tmp/drbd7", 4, "not configured")?;

    let guest = WithDisk::on(pair, "phy:/dev/drbd0,xvda,w")?;
    guest.writes(10)?;
    let refused = protect(a, "guest", "").map_or_else(|e| e.to_string(), |()| "it was not refused".into());
    ensure!(
        refused.contains("protocol C") && refused.contains("mirrored disk"),
        "protecting a guest on DRBD: {refused}"
    );
    ctx.note(&format!("refused: {refused}"));
    guest.goes_on()?;

    b.sh("drbdadm down r0 && modprobe -r drbd && mknod /tmp/drbd0 b 147 0")?;
    probe(b, "/tmp/drbd0", 2, "no DRBD in the kernel")?;
    // Alone it is still an ordinary DRBD, and still refused for that.
    probe(a, "/dev/drbd0", 3, "protocol C")?;
    guest.goes_on()
}

/// Both ends of the connection, as `drbdsetup` of DRBD 8.4 wants them: local and remote address.
fn ends(host: &Host) -> &'static str {
    if host.name() == "a" {
        "ipv4:10.77.0.1:7790 ipv4:10.77.0.2:7790"
    } else {
        "ipv4:10.77.0.2:7790 ipv4:10.77.0.1:7790"
    }
}

fn probe(host: &Host, device: &str, code: i32, word: &str) -> Result<()> {
    let said = host.run(&format!("/usr/local/lib/remus/block-drbd-probe {device}"))?;
    ensure!(
        said.status == code && said.stderr.contains(word),
        "the probe of {device} on host {}: {said:?}, expected {code} and {word:?}",
        host.name()
    );
    Ok(())
}
