//! The harness tried on itself: what every other scenario relies on.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::pair::Pair;
use crate::wait::wait_until;

pub(super) const SELF: Scenario = Scenario {
    name: "main-harness-self",
    about: "the nested hosts, their links and every fault the harness can inject",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

const PAIRS: [(Party, Party); 3] = [(Party::A, Party::B), (Party::A, Party::Client), (Party::B, Party::Client)];

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    for host in pair.hosts() {
        let list = host.sh("xl list")?;
        ensure!(list.contains("Domain-0"), "xl list of host {}: {list}", host.name());
        let name = host.sh("hostname")?;
        ensure!(name == format!("host{}", host.name()), "hostname: {name}");
    }
    ctx.note("xl answers; ssh both ways");
    ensure!(pair.a().sh("ssh hostb hostname")? == "hostb", "ssh from a to b");
    ensure!(pair.b().sh("ssh hosta hostname")? == "hosta", "ssh from b to a");
    commands(ctx)?;
    for cuts in 0..8_usize {
        let is_cut = |index: usize| cuts & (1 << index) != 0;
        for (index, (one, other)) in PAIRS.into_iter().enumerate() {
            if is_cut(index) { pair.cut(one, other)? } else { pair.join(one, other)? }
        }
        for (index, (one, other)) in PAIRS.into_iter().enumerate() {
            expect_link(pair, one, other, !is_cut(index)).with_context(|| format!("with cuts {cuts:03b}"))?;
        }
    }
    for (one, other) in PAIRS {
        pair.join(one, other)?;
    }
    ctx.note("all 8 combinations of cut links cut just what they should");
    one_way(pair)?;
    let collected = ctx.logs().join("collected");
    pair.a().collect_logs(&collected)?;
    for file in ["tmp/xl-list.txt", "var/log/xen/console/hypervisor.log"] {
        let file = collected.join("a").join(file);
        ensure!(file.metadata().is_ok_and(|meta| meta.len() > 0), "{} was not collected", file.display());
    }
    freeze(ctx)?;
    power(ctx)?;
    reset(ctx)
}

fn commands(ctx: &Ctx<'_>) -> Result<()> {
    let host = ctx.pair().a();
    let output = host.run("echo out; echo err >&2; exit 7")?;
    ensure!((output.status, output.stdout.as_str(), output.stderr.as_str()) == (7, "out\n", "err\n"), "{output:?}");
    let file = ctx.logs().join("pushed");
    std::fs::write(&file, [0, 255, 10].repeat(100_000))?;
    host.push(&[&file], "/root/pushed")?;
    ensure!(host.pull("/root/pushed")? == std::fs::read(&file)?, "push and pull differ");
    let sleeper = host.spawn("exec -a xt-victim sleep 1000")?;
    wait_until(Duration::from_secs(20), "victim runs", || Ok(host.run("pgrep -f xt-victim")?.ok().then_some(())))?;
    host.kill9("xt-victim")?;
    let output = sleeper.wait_output()?;
    ensure!(output.status == -9, "killed command ended with {}", output.status);
    ensure!(host.kill9("xt-victim").is_err(), "kill9 of nothing must be an error");
    drop(host.spawn("exec -a xt-dropped sleep 1000")?);
    wait_until(Duration::from_secs(20), "dropped command killed", || {
        Ok((!host.run("pgrep -f 'xt-[d]ropped'")?.ok()).then_some(()))
    })
}

fn expect_link(pair: &Pair, one: Party, other: Party, up: bool) -> Result<()> {
    let works = ping(pair, one, other, up)?;
    if works != up {
        bail!("{} {} {}", one.name(), if works { "still reaches" } else { "does not reach" }, other.name());
    }
    Ok(())
}

/// Whether one answers the other. Waits longer when an answer is expected.
fn ping(pair: &Pair, one: Party, other: Party, expected: bool) -> Result<bool> {
    let options = if expected { "-c 3 -i 0.2 -W 5" } else { "-c 1 -W 0.7" };
    // The client is never `one` of a pair with a host as `other`: pings start in the host.
    let host = if one == Party::A { pair.a() } else { pair.b() };
    let target = match other {
        Party::A => "hosta",
        Party::B => "hostb",
        Party::Client => "client",
    };
    Ok(host.run(&format!("ping -n -q {options} {target}"))?.ok())
}

/// A cut holds for packets that want no answer, too, and for a sender that has to ask for the
/// client's hardware address anew.
fn one_way(pair: &Pair) -> Result<()> {
    let socket = pair
        .client_ns()
        .call(|| UdpSocket::bind("0.0.0.0:9999"))?
        .context("cannot listen in the client's namespace")?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    let send = |text: &str| {
        pair.a().sh(&format!(
            "ip neigh flush all; echo {text} | socat - UDP:client:9999; \
             echo {text} | socat - UDP-DATAGRAM:10.77.0.255:9999,broadcast"
        ))
    };
    let mut buffer = [0; 64];
    pair.cut(Party::A, Party::Client)?;
    send("leak")?;
    ensure!(socket.recv(&mut buffer).is_err(), "a datagram came through a cut link");
    pair.join(Party::A, Party::Client)?;
    send("joined")?;
    let count = socket.recv(&mut buffer).context("no datagram over a joined link")?;
    ensure!(&buffer[..count] == b"joined\n", "a datagram of the time of the cut came late");
    Ok(())
}

fn freeze(ctx: &Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    pair.b().freeze()?;
    let stuck = !ping(pair, Party::A, Party::B, false)?;
    pair.b().thaw()?;
    ensure!(stuck, "a frozen host answered");
    wait_until(Duration::from_secs(20), "b answers after the thaw", || {
        Ok(ping(pair, Party::A, Party::B, true)?.then_some(()))
    })?;
    ctx.note("freeze and thaw");
    Ok(())
}

fn power(ctx: &Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    pair.b().sh("echo kept >/root/kept && sync")?;
    let lost = pair.b().spawn("sleep 1000")?;
    pair.b().power_off();
    ensure!(lost.wait_output().is_err(), "a command outlived the power of its host");
    ensure!(!ping(pair, Party::A, Party::B, false)?, "a host without power answered");
    pair.cut(Party::A, Party::B).context("a link of a host that is off")?;
    let start = Instant::now();
    pair.b().boot()?;
    expect_link(pair, Party::A, Party::B, false).context("cut while b was off")?;
    pair.join(Party::A, Party::B)?;
    expect_link(pair, Party::A, Party::B, true)?;
    ctx.note(&format!("power loss and boot ({:.1} s)", start.elapsed().as_secs_f32()));
    ensure!(pair.b().sh("cat /root/kept")? == "kept", "the disk lost what was synced");
    Ok(())
}

fn reset(ctx: &Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    pair.a().sh("echo x >/root/mark; echo x >/run/mark; xenstore-write /mark x")?;
    pair.cut(Party::A, Party::B)?;
    pair.a().freeze()?;
    pair.b().power_off();
    let start = Instant::now();
    pair.reset(crate::host::Snapshot::Ready)?;
    ctx.note(&format!("reset of a frozen and a dead host ({:.1} s)", start.elapsed().as_secs_f32()));
    let left = pair.a().sh("ls /root/mark /run/mark 2>/dev/null; xenstore-exists /mark && echo store");
    ensure!(left.is_err(), "left after the reset: {left:?}");
    expect_link(pair, Party::A, Party::B, true)?;
    let client = pair
        .client_ns()
        .call(|| Command::new("ping").args(["-n", "-q", "-c", "1", "-W", "5", "10.77.0.2"]).output())??;
    ensure!(client.status.success(), "the client does not reach b after the reset");
    for host in pair.hosts() {
        let there: u64 = host.sh("date +%s")?.parse()?;
        let here = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        ensure!(here.abs_diff(there) <= 2, "clock of {}: {there}, here {here}", host.name());
        host.sh("xl list && ssh hosta true && ssh hostb true")?;
    }
    guest_after_reset(ctx)
}

/// Nested SVM still works on a machine that came out of a snapshot.
fn guest_after_reset(ctx: &Ctx<'_>) -> Result<()> {
    let host = ctx.pair().b();
    host.sh("xl create /opt/guest/pvh.cfg")?;
    let start = Instant::now();
    wait_until(Duration::from_secs(90), "the guest answers a ping", || {
        Ok(host.run("ping -n -q -c 1 -W 2 10.77.0.11")?.ok().then_some(()))
    })?;
    ctx.note(&format!("a guest runs after the reset ({:.1} s)", start.elapsed().as_secs_f32()));
    host.sh("xl destroy guest").map(drop)
}
