//! Output commit (R1; issue scenario 2): with the link cut between capture and acknowledgement, nothing that the guest sends is seen by
//! anyone until somebody owns the guest again. Every kind of frame, by a sniffer outside both hosts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::client::{BeaconSink, Capture, Content, EchoClient, Frame, NeighbourProber, Sniffer};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{PATIENCE, Protected, at, nothing_left, protect, wait_epochs, wait_event};
use crate::wait::wait_until;

pub(super) const COMMIT: Scenario = Scenario {
    name: "main-output-commit",
    about: "with the link cut before the acknowledgement, no frame of the guest leaves: TCP and UDP over IPv4 and IPv6, ARP, ND",
    hosts: 2,
    start: Snapshot::Guest,
    run,
};

/// What an acknowledgement that was already on its way may still release.
const UNDERWAY: Duration = Duration::from_secs(3);

/// How long nothing may be seen.
const SILENT: Duration = Duration::from_secs(12);

const KINDS: [&str; 6] =
    ["tcp over ipv4", "tcp over ipv6", "udp over ipv4", "udp over ipv6", "arp answer", "neighbour advertisement"];

fn kind(frame: &Frame) -> Option<&'static str> {
    Some(match &frame.content {
        Content::Tcp { from, .. } => KINDS[usize::from(from.is_ipv6())],
        Content::Udp { from, .. } => KINDS[2 + usize::from(from.is_ipv6())],
        Content::Arp { request: false, .. } => KINDS[4],
        Content::Icmp6 { kind: 136, .. } => KINDS[5],
        _ => return None,
    })
}

fn missing(capture: &Capture, from: Instant) -> Vec<&'static str> {
    let seen: Vec<_> = capture.between(from, Instant::now()).filter_map(kind).collect();
    KINDS.into_iter().filter(|k| !seen.contains(k)).collect()
}

fn every_kind_is_seen(sniffer: &Sniffer, from: Instant) -> Result<()> {
    let mut lacking = Vec::new();
    wait_until(PATIENCE, "every kind of frame is seen", || {
        lacking = missing(&sniffer.capture(), from);
        Ok(lacking.is_empty().then_some(()))
    })
    .with_context(|| format!("not seen: {lacking:?}"))
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::make(pair)?;
    let guest = &protected.guest;
    let (mac, ports, [ip4, ip6]) = (guest.mac(), *guest.ports(), guest.addresses());
    let client_ip = std::net::IpAddr::from([10, 77, 0, 100]);
    let (sniffer, _flows, sink) = pair.client_ns().call(move || -> Result<_> {
        let sniffer = Sniffer::start("client", mac)?;
        let every = Duration::from_millis(200);
        let flows = (
            [
                EchoClient::tcp(at(ip4, ports.echo_tcp), 10.0, 64, PATIENCE)?,
                EchoClient::tcp(at(ip6, ports.echo_tcp), 10.0, 64, PATIENCE)?,
            ],
            [EchoClient::udp(at(ip4, ports.echo_udp), 10.0, 64)?, EchoClient::udp(at(ip6, ports.echo_udp), 10.0, 64)?],
            [NeighbourProber::start("client", ip4, every)?, NeighbourProber::start("client", ip6, every)?],
        );
        Ok((sniffer, flows, BeaconSink::bind(client_ip)?))
    })??;
    let spec = sink.order(10.0, 64)?;
    guest.ask(move |c| c.beacon(spec))?;
    protect(pair.a(), "guest", "--on-backup-loss hold")?;
    wait_epochs(pair.a(), "guest", 3)?;
    let start = Instant::now();
    every_kind_is_seen(&sniffer, start).context("before the cut")?;

    ctx.note("every kind of frame is seen; the hosts are cut from each other, the client is not");
    pair.cut(Party::A, Party::B)?;
    let cut = Instant::now();
    std::thread::sleep(UNDERWAY + SILENT);
    let (from, to) = (cut + UNDERWAY, Instant::now());
    wait_event(pair.a(), "guest", EventKind::Holding)?;
    let capture = sniffer.capture();
    ensure!(capture.dropped == 0 && capture.failed.is_none(), "the capture is not whole: {} dropped", capture.dropped);
    let leaked: Vec<_> = capture.between(from, to).collect();
    ensure!(leaked.is_empty(), "{} frames left unacknowledged, the first: {:?}", leaked.len(), leaked.first());
    ctx.note(&format!("no frame in {} s; the operator lets the primary's copy go on", SILENT.as_secs()));

    let owned = Instant::now();
    pair.a().sh("remus unprotect guest")?;
    every_kind_is_seen(&sniffer, owned).context("after the operator's word")?;
    protected.goes_on()?;
    nothing_left(pair.a())
}
