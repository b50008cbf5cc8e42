//! Bad input: each ends with a sentence that says what is wrong and what to do, and the guest runs on (issue, "Bad input").

use anyhow::{Result, ensure};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::Host;
use crate::host::Snapshot;
use crate::protection::{
    Guest, PATIENCE, no_copy, nothing_left, protect, slow_host_options, start_daemon, start_daemons,
};

pub(super) const REFUSALS: Scenario = Scenario {
    name: "main-refusals",
    about: "unknown domain, PV guest, disk, missing module, wrong peers, full disk, name clash: a clear sentence, the guest runs on",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

/// Carries a link over ssh, and breaks it off or damages it after so many bytes.
const RELAY: &str = r#"
import os, subprocess, sys
fault, limit = sys.argv[1], int(sys.argv[2])
ssh = subprocess.Popen(["ssh", "hostb", "remusd", "connect"], stdin=subprocess.PIPE)
seen = 0
while True:
    data = os.read(0, 65536)
    if not data:
        break
    seen += len(data)
    if seen > limit:
        if fault == "cut":
            ssh.kill()
            sys.exit(0)
        data = bytes([data[0] ^ 255]) + data[1:]
    ssh.stdin.write(data)
    ssh.stdin.flush()
"#;

/// Runs a command that must fail, and say all of `words`.
fn refused(ctx: &Ctx<'_>, host: &Host, command: &str, words: &[&str]) -> Result<()> {
    let output = host.run(command)?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(!output.ok(), "{command} was not refused: {said}");
    for word in words {
        ensure!(said.contains(word), "{command} must say {word:?}, it said: {said}");
    }
    ctx.note(said.trim().lines().last().unwrap_or_default());
    Ok(())
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let a = pair.a();
    let options = slow_host_options();
    refused(ctx, a, "remus status", &["No remusd answers", "systemctl"])?;
    start_daemons(pair)?;
    refused(ctx, a, "remus protect nosuch hostb", &["No domain is called nosuch", "xl list"])?;
    refused(ctx, a, "remus protect Domain-0 hostb", &["Domain-0 cannot be protected"])?;
    refused(ctx, a, "remus protect x hostb --interval 0", &["interval-ms"])?;
    refused(ctx, a, "remus failover nosuch --primary-is-off", &["holds no copy of nosuch"])?;

    let guest = Guest::create(pair, a, GuestSpec::new(Kind::Pvh))?;
    let client = guest.counter(10.0)?;
    refused(ctx, a, &format!("remus protect guest nosuchhost {options}"), &["nosuchhost"])?;
    refused(ctx, a, &format!("remus protect guest 'echo hello; sleep 1' -s '' {options}"), &["peer"])?;
    // A stream that breaks off, and one with a flipped byte, both in the middle of the first copy.
    a.sh(&format!("cat >/root/relay.py <<'END'{RELAY}END"))?;
    for fault in ["cut", "flip"] {
        let relay = format!("exec python3 /root/relay.py {fault} 3000000");
        refused(ctx, a, &format!("remus protect guest '{relay}' -s '' {options}"), &["UNPROTECTED"])?;
    }
    no_copy(pair.b(), "guest")?;

    a.sh("truncate -s 8M /root/disk.img")?;
    // No file system of the guest waits for it, so it does not matter whether its frontend connects.
    a.sh("xl block-attach guest format=raw,vdev=xvdb,access=rw,target=/root/disk.img")?;
    refused(ctx, a, &format!("remus protect guest hostb {options}"), &["vbd", "--unsafe disk:xvdb"])?;
    a.sh("xl block-detach --force guest xvdb")?;

    ctx.note("a kernel without the plug qdisc");
    a.sh("modinfo -n sch_plug >/root/where && modprobe -r sch_plug && mv $(cat /root/where) /root/sch_plug.away && depmod")?;
    refused(ctx, a, &format!("remus protect guest hostb {options}"), &["sch_plug"])?;
    a.sh("mv /root/sch_plug.away $(cat /root/where) && depmod")?;

    ctx.note("a full disk under the state");
    a.sh("p=$(pgrep -x remusd); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done; \
          mount -t tmpfs -o size=64k tmpfs /var/lib/remus && dd if=/dev/zero of=/var/lib/remus/full bs=1k 2>/dev/null; true")?;
    // Whether it does not start or starts and refuses: it says why.
    let full = a.run(
        "REMUSD_LOG=info setsid remusd >/root/full.log 2>&1 </dev/null & d=$!; \
         until remus status >/dev/null 2>&1 || ! kill -0 $d 2>/dev/null; do sleep 0.2; done; \
         remus protect guest hostb; cat /root/full.log",
    )?;
    let said = format!("{}{}", full.stdout, full.stderr);
    ensure!(said.contains("No space left") && said.contains("full"), "a full disk must be named: {said}");
    a.sh("pkill -x remusd; while pgrep -x remusd >/dev/null; do sleep 0.1; done; umount /var/lib/remus")?;
    start_daemon(a)?;

    ctx.note("a name clash on the backup");
    let mut other = GuestSpec::new(Kind::Pvh).numbered("guest", 33);
    other.memory_mb = 128;
    let b = pair.b();
    b.sh(&other.create_command())?;
    refused(ctx, a, &format!("remus protect guest hostb {options}"), &["guest", "hostb"])?;
    b.sh("xl destroy guest")?;

    nothing_left(a)?;
    let from = client.last().map_or(0, |x| x.line.n);
    ensure!(client.wait_for(from + 20, PATIENCE).is_some(), "the guest does not run on");
    let report = client.report();
    ensure!(
        report.gaps + report.regressions == 0 && report.ended.is_none(),
        "the refusals were felt by the client: {report:?}"
    );
    guest.is_the_same()?;
    protect(a, "guest", "")?;
    a.sh("remus unprotect guest")?;
    nothing_left(a)
}
