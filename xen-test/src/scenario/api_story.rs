//! Issue 4's own acceptance: the events of both hosts, read by `remus events --follow --json`, tell the whole story of a failover in
//! order; a client in another language protects the guest; what a stranger says to the socket costs nothing.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use remusd::ops::{Event, EventKind, OperationKind};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::pair::Pair;
use crate::protection::{DETECTION, Guest, PATIENCE, events, start_daemons, wait_epochs, wait_event};
use crate::wait::wait_until;

pub(super) const STORY: Scenario = Scenario {
    name: "api-story",
    about: "the events of both hosts tell a failover in order and without a gap; a Python client protects; strangers cost nothing",
    hosts: 2,
    start: Snapshot::Guest,
    run,
};

/// What is followed on each host, from before anything happens.
const FOLLOWED: &str = "/root/followed.jsonl";

fn follow(host: &Host) -> Result<()> {
    host.sh(&format!("rm -f {FOLLOWED}; setsid remus events --follow --json >{FOLLOWED} 2>&1 </dev/null &")).map(drop)
}

/// What was followed so far. Fails if the daemon said that something was missed.
fn followed(host: &Host) -> Result<Vec<Event>> {
    let text = String::from_utf8(host.pull(FOLLOWED)?)?;
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).with_context(|| format!("followed: {line}"))?;
            let event = value.get("event").with_context(|| format!("no event but {line}"))?;
            Ok(serde_json::from_value(event.clone())?)
        })
        .collect()
}

/// Fails unless the numbers have no gap and these kinds come in this order, with anything between them.
fn tells(host: &Host, events: &[Event], story: &[EventKind]) -> Result<()> {
    for pair in events.windows(2) {
        ensure!(pair[1].seq == pair[0].seq + 1, "host {}: event {} follows {}", host.name(), pair[1].seq, pair[0].seq);
        ensure!(pair[1].time_ms >= pair[0].time_ms, "host {}: time runs backwards at {}", host.name(), pair[1].seq);
    }
    let mut kinds = events.iter().map(|event| event.kind);
    for kind in story {
        ensure!(
            kinds.any(|told| told == *kind),
            "host {} does not tell {} in its place: {:?}",
            host.name(),
            kind.name(),
            events.iter().map(|event| event.kind.name()).collect::<Vec<_>>()
        );
    }
    Ok(())
}

/// The one end of a job of this kind that was told with a tag.
fn end_of(events: &[Event], kind: OperationKind) -> Result<(&Event, String)> {
    let ends: Vec<_> = events
        .iter()
        .filter(|event| event.kind == EventKind::OperationComplete)
        .filter_map(|event| Some((event, event.operation.clone()?)))
        .filter(|(_, note)| note.kind == kind)
        .collect();
    ensure!(ends.len() == 1, "{} ends of {kind} were told", ends.len());
    let (event, note) = ends[0].clone();
    ensure!(note.outcome == "completed", "{kind} ended as {}: {}", note.outcome, event.detail);
    let jobs = events.iter().filter(|e| e.kind == EventKind::JobCompleted);
    let same = jobs.filter(|e| e.operation.as_ref().is_some_and(|n| n.id == note.id)).count();
    ensure!(same == 1, "job {} has completed {same} times", note.id);
    Ok((event, note.tag.context("an end without its tag")?))
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    start_daemons(pair)?;
    let guest = Guest::create(pair, a, GuestSpec::new(Kind::Pvh))?;
    let client = guest.counter(20.0)?;
    guest.dirty(100, 64, 8)?;
    pair.each(follow)?;

    python_protects(ctx, pair)?;
    wait_epochs(a, "guest", 3)?;
    for host in [a, b] {
        strangers(ctx, host)?;
    }
    wait_epochs(a, "guest", 3)?;
    ensure!(!events(a)?.iter().any(|event| event.kind == EventKind::Unprotected), "the strangers have cost protection");

    let domid: u32 = a.sh("xl domid guest")?.trim().parse()?;
    let told = followed(a)?;
    a.power_off();
    let lost = Instant::now();
    wait_event(b, "guest", EventKind::PrimarySuspect)?;
    let job = b.sh("remus failover guest --primary-is-off --tag story --json")?;
    wait_event(b, "guest", EventKind::OperationComplete)?;
    ensure!(client.first_after(lost + DETECTION, PATIENCE).is_some(), "the client's connection stayed silent");
    guest.is_the_same()?;

    use EventKind::{
        Activated, Activating, FirstCopyProgress, JobCompleted, OperationComplete, PrimarySuspect, Protected,
        Protecting, Ready, Receiving,
    };
    tells(a, &told, &[Protecting, FirstCopyProgress, Protected, JobCompleted, OperationComplete])?;
    let (_, tag) = end_of(&told, OperationKind::Protect)?;
    ensure!(tag.starts_with("protect.py-"), "the client's tag came back as {tag}");
    let uuid = told[0].domain.uuid;
    for event in &told {
        ensure!(event.domain.uuid == uuid && event.domain.name == "guest", "another domain: {event:?}");
        ensure!(event.domain.domid.is_some_and(|id| id.0 == domid), "another id than {domid}: {event:?}");
    }

    let theirs = wait_until(PATIENCE, "the follower on host b has the end", || {
        Ok(Some(followed(b)?).filter(|told| told.iter().any(|e| e.kind == OperationComplete)))
    })?;
    tells(b, &theirs, &[Receiving, Ready, PrimarySuspect, Activating, Activated, JobCompleted, OperationComplete])?;
    let (end, tag) = end_of(&theirs, OperationKind::Failover)?;
    let number = end.operation.as_ref().map(|note| note.id.0).unwrap_or_default();
    ensure!(tag == "story" && job.contains(&format!("\"job\":{number}")), "the call said {job}, the event {end:?}");
    ensure!(theirs.iter().all(|event| event.domain.uuid == uuid), "the protection has two UUIDs");
    let runs: u32 = b.sh("xl domid guest")?.trim().parse()?;
    let activated = theirs.iter().find(|event| event.kind == Activated).context("activated")?;
    ensure!(activated.domain.domid.is_some_and(|id| id.0 == runs), "activated as {activated:?}, runs as {runs}");

    let line = |host: &str, event: &Event| {
        format!(
            "{} {host} {:4} {} {}: {}\n",
            event.time_ms,
            event.seq,
            event.domain.name,
            event.kind.name(),
            event.detail
        )
    };
    let mut lines: Vec<_> = told.iter().map(|e| line("a", e)).chain(theirs.iter().map(|e| line("b", e))).collect();
    lines.sort();
    std::fs::write(ctx.logs().join("story.txt"), lines.concat())?;
    ctx.note(&format!("{} events of host a and {} of host b, without a gap", told.len(), theirs.len()));
    Ok(())
}

/// The example client, as it is in docs/examples, protects the guest and follows its events.
fn python_protects(ctx: &Ctx<'_>, pair: &Pair) -> Result<()> {
    let a = pair.a();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/protect.py");
    a.push(&[script], "/root/protect.py")?;
    let options = format!(
        "detection_ms={} ack_deadline_ms=30000 suspend_deadline_ms=20000 pause_deadline_ms=30000",
        DETECTION.as_millis()
    );
    a.sh(&format!("setsid python3 /root/protect.py guest hostb {options} >/root/protect.out 2>&1 </dev/null &"))?;
    let said = wait_until(PATIENCE * 3, "protect.py tells of the end of its job", || {
        let said = a.sh("cat /root/protect.out; pgrep -f protect.py >/dev/null || echo GONE")?;
        ensure!(!said.contains("GONE"), "protect.py has ended: {said}");
        Ok(said.contains(" operation_complete: ").then_some(said))
    })?;
    for words in ["job ", ": protecting guest", " protecting: ", " first_copy_progress: ", " protected: "] {
        ensure!(said.contains(words), "protect.py does not say {words:?}: {said}");
    }
    let status = a.sh("python3 /root/protect.py --status")?;
    ensure!(status.starts_with("guest: primary, protected"), "protect.py --status: {status}");
    let refused = a.run("python3 /root/protect.py nosuch hostb")?;
    ensure!(refused.status == 1 && refused.stderr.contains("NotFound"), "protect.py nosuch: {refused:?}");
    ctx.note(&format!("protect.py: {status}"));
    Ok(())
}

/// Everything that can be said to the socket that makes no sense, by root and by nobody.
const HOSTILE: &str = r#"
import json, os, resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
path = "/run/remus/remusd.sock"
def connect():
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(path); return s
def say(data):
    s = connect()
    try:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        got = b""
        while True:
            chunk = s.recv(65536)
            if not chunk: return got
            got += chunk
    except (BrokenPipeError, ConnectionResetError):
        return b"reset"
call = lambda method, **p: json.dumps({"method": method, "parameters": p}).encode() + b"\0"
c = "org.remus.Control."
for data in [b"\0", b"garbage\0", os.urandom(4096) + b"\0", b"{" * 100000 + b"\0", b"[" * 500000 + b"\0",
             b'{"method":1}\0', call("x"), call(c + "Nope"), call(c + "Abort", job="1"), call(c + "Abort", job=-1),
             call(c + "Status", domain=7), call(c + "Protect", domain="guest", target={}),
             call(c + "Protect", domain="guest", target={"host": "-oProxyCommand=true", "blackhole": True}),
             call(c + "FollowEvents"), call(c + "Jobs", what=1)]:
    answer = say(data)
    assert b'"error"' in answer or answer in (b"", b"reset"), (data[:60], answer[:200])
    assert b'"job"' not in answer, answer
# A message without an end.
s = connect()
sent = 0
try:
    while sent < 64 << 20:
        s.sendall(b"x" * 65536); sent += 65536
    raise SystemExit("64 MiB without an end were taken")
except (BrokenPipeError, ConnectionResetError, socket.timeout):
    pass
# Many that say nothing, and many that follow and never read.
idle = []
for n in range(300):
    try:
        s = connect()
        if n % 2: s.sendall(b'{"method":"org.remus.Control.FollowEvents","more":true}\0')
        idle.append(s)
    except OSError:
        break
time.sleep(3)
print(json.dumps({"idle": len(idle)}))
"#;

fn strangers(ctx: &Ctx<'_>, host: &Host) -> Result<()> {
    let resident = || -> Result<u64> {
        let text = host.sh("awk '/VmRSS/ {print $2}' /proc/$(pgrep -x remusd | head -n 1)/status")?;
        Ok(text.trim().parse()?)
    };
    let events_before = events(host)?.len();
    let before = resident()?;
    host.sh(&format!("cat >/root/hostile.py <<'EOF'\n{HOSTILE}\nEOF"))?;
    let asked = Instant::now();
    let said = host.sh("python3 /root/hostile.py")?;
    ctx.note(&format!("host {}: hostile requests took {:.1} s: {said}", host.name(), asked.elapsed().as_secs_f32()));
    let after = resident()?;
    ensure!(after < before + 32 * 1024, "host {}: remusd grew from {before} to {after} KiB", host.name());
    // Somebody without any right: neither to act nor, without the group, to read.
    let nobody = host.run("su -s /bin/sh nobody -c 'remus unprotect guest'")?;
    ensure!(!nobody.ok(), "nobody may end a protection: {}", nobody.stdout);
    let begun: Vec<_> = events(host)?.into_iter().skip(events_before).filter(|e| e.operation.is_some()).collect();
    ensure!(begun.is_empty(), "jobs came of it: {begun:?}");
    let answer = Instant::now();
    host.sh("remus status")?;
    ctx.note(&format!(
        "host {}: {before} KiB before, {after} KiB after; status answers in {} ms",
        host.name(),
        answer.elapsed().as_millis()
    ));
    Ok(())
}
