//! Two hosts that are paired: the link is TLS between the daemons, a stranger gets nothing, and a failover works as over ssh.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::{Carrier, Protected, fail_over, protect_over, wait_epochs};

pub(super) const PAIRED: Scenario = Scenario {
    name: "safety-paired",
    about: "remus pair, protection over TLS without ssh, keys rotated meanwhile, failover; strangers and the unpaired get nothing",
    hosts: 2,
    start: Snapshot::Guest,
    run,
};

/// The port of the link between daemons.
const PORT: u16 = 7368;

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    let protected = Protected::make(pair)?;

    ensure!(!b.run(&format!("ss -ltn | grep -q :{PORT}"))?.ok(), "host b listens although it is paired with nobody");
    let unpaired = a.run("remus protect guest hostb --transport tls")?;
    ensure!(!unpaired.ok() && unpaired.stderr.contains("pair"), "TLS to a host that is not paired: {unpaired:?}");
    let unasked = a.run("remus pair hostb --json </dev/null")?;
    ensure!(unasked.status == 5, "pinned without anybody's consent: {unasked:?}");
    let shown: serde_json::Value = serde_json::from_str(&b.sh("remus keys show --json")?)?;
    let fingerprint = find_fingerprint(&shown).with_context(|| format!("no fingerprint in {shown}"))?;
    ensure!(
        unasked.stdout.contains(&fingerprint) || unasked.stderr.contains(&fingerprint),
        "the refusal does not name {fingerprint}: {unasked:?}"
    );
    let wrong = a.run("remus pair hostb --yes SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA --json")?;
    ensure!(!wrong.ok(), "paired with a fingerprint that is not shown: {wrong:?}");
    a.sh(&format!("remus pair hostb --yes {fingerprint} --json"))?;
    ctx.note(&format!("paired: {fingerprint}"));

    // Who does not speak TLS is sent away before a byte of the link's own protocol.
    let plain = b.run(&format!("printf 'garbage\\n' | timeout 10 socat - TCP:localhost:{PORT} | od -c | head -3"))?;
    ensure!(!plain.stdout.to_lowercase().contains("remus"), "who speaks no TLS got {plain:?}");

    b.sh("pkill -x sshd; true")?;
    protect_over(Carrier::Usual, a, "guest", "").context("over TLS, with no ssh on the other host")?;
    wait_epochs(a, "guest", 3)?;
    ensure!(a.sh("pgrep -x ssh || true")?.is_empty(), "the link is an ssh");
    ctx.note("protected over TLS with no ssh on the other host");
    ctx.note(a.sh("remus keys rotate")?.lines().last().unwrap_or_default());
    wait_epochs(a, "guest", 2).context("after the keys were changed")?;
    protected.goes_on()?;

    a.power_off();
    let failover = fail_over(b, &protected.guest, &protected.client, Instant::now())?;
    ctx.note(&format!("failed over, first byte after {:.1} s", failover.first_byte.as_secs_f32()));
    protected.goes_on()?;

    b.sh("remus unpair hosta")?;
    let peers = b.sh("remus peers --json")?;
    ensure!(!peers.contains("hosta"), "still a peer: {peers}");
    Ok(())
}

/// The first text in the answer that looks like one.
fn find_fingerprint(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => text.starts_with("SHA256:").then(|| text.clone()),
        serde_json::Value::Array(list) => list.iter().find_map(find_fingerprint),
        serde_json::Value::Object(map) => map.values().find_map(find_fingerprint),
        _ => None,
    }
}
