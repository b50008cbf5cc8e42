//! The client against the guest's own servers on loopback, and the packet
//! parts in network namespaces of their own.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command as Process;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use xen_test_guest::protocol::{DirtySpec, Order, Ports, Rate};
use xen_test_guest::server::{End, Servers};

use super::*;

const LONG: Duration = Duration::from_secs(20);
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn guest() -> (Ports, Receiver<End>) {
    let (ends, ended) = channel();
    let servers = Servers::start(Ports::ANY, move |end| {
        let _ = ends.send(end);
    })
    .expect("free ports");
    (servers.ports(), ended)
}

/// Runs in a new network namespace with `lo` up.
fn in_netns<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let job = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root, for a network namespace");
        ip("link set lo up");
        f()
    };
    thread::spawn(job).join().expect("the test body")
}

fn ip(arguments: &str) {
    let out = Process::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    assert!(out.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Two ends of a cable, `here` (10.99.0.1, fd99::1) and `there` (.2, ::2),
/// in one namespace, whose kernel answers on both.
fn cable() {
    ip("link add here type veth peer name there");
    for (name, n) in [("here", 1), ("there", 2)] {
        for key in ["accept_local", "arp_ignore"] {
            // arp_ignore 1: an end answers for its own addresses only.
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/{key}"), "1").expect("a sysctl");
        }
        ip(&format!("addr add 10.99.0.{n}/24 dev {name}"));
        ip(&format!("addr add fd99::{n}/64 dev {name} nodad"));
        ip(&format!("link set {name} up"));
    }
}

#[test]
fn the_counter_runs_without_gaps_over_both_families_and_changes_its_rate() {
    let (ports, _) = guest();
    for host in [V4, V6] {
        let c = CounterClient::connect((host, ports.counter).into(), Rate { hz: 500.0, payload: 100 }, LONG)
            .expect("a connection");
        c.wait_for(100, LONG).expect("100 lines");
        c.ask(Rate { hz: 0.0, payload: 0 }).expect("a connection");
        let last = c.wait_silent(Duration::from_millis(300), LONG).expect("silence");
        assert!(c.report().longest_silence_ms >= 300.0);
        let asked = Instant::now();
        c.ask(Rate { hz: 100.0, payload: 0 }).expect("a connection");
        let first = c.first_after(asked, LONG).expect("a line");
        assert_eq!(first.line.n, last.line.n + 1);
        let r = c.report();
        assert_eq!((r.gaps, r.regressions, r.time_regressions, r.ended), (0, 0, 0, None));
        assert_eq!(r.lines, c.last().expect("lines").line.n.min(r.lines));
        assert!(c.report_since(asked).lines < r.lines);
    }
}

#[test]
fn the_counter_client_sees_a_guest_that_went_back_in_time() {
    let liar = TcpListener::bind((V4, 0)).expect("a port");
    let to = liar.local_addr().expect("bound");
    let guest = thread::spawn(move || {
        let (mut s, _) = liar.accept().expect("a client");
        // Closing with the request unread would be a reset, which may
        // overtake the lines.
        let mut request = [0; 64];
        let got = s.read(&mut request).expect("a client");
        assert!(request[..got].ends_with(b"\n"), "{request:?}");
        s.write_all(b"1 100\n2 200\n5 300\n4 290\n4 400\n5 500\n").expect("a client");
    });
    let c = CounterClient::connect(to, Rate { hz: 1.0, payload: 0 }, LONG).expect("a connection");
    guest.join().expect("no panic");
    let end = Instant::now() + LONG;
    while c.ended().is_none() && Instant::now() < end {
        thread::yield_now();
    }
    let r = c.report();
    assert_eq!((r.lines, r.gaps, r.regressions, r.time_regressions), (6, 2, 2, 1), "{r:?}");
    assert!(r.ended.is_some());
    assert_eq!(c.first_after(Instant::now(), LONG), None);
}

#[test]
fn echo_is_answered_once_and_measured_over_tcp_and_udp_and_both_families() {
    let (ports, _) = guest();
    for host in [V4, V6] {
        let tcp = EchoClient::tcp((host, ports.echo_tcp).into(), 200.0, 64, LONG).expect("a connection");
        let udp = EchoClient::udp((host, ports.echo_udp).into(), 200.0, 64).expect("a socket");
        for (client, name) in [(&tcp, "tcp"), (&udp, "udp")] {
            let mut when = Instant::now();
            for _ in 0..20 {
                let e = client.first_answer_after(when, LONG).unwrap_or_else(|| panic!("no {name} answer from {host}"));
                when = e.answered.expect("it was answered");
            }
            let r = client.report();
            assert!(r.answered >= 20 && r.sent >= r.answered, "{name}: {r:?}");
            assert_eq!((r.repeats, r.regressions, r.ended.clone()), (0, 0, None), "{name}: {r:?}");
            assert!(r.rtt.count as u64 == r.answered && r.rtt.p50_ms > 0.0, "{name}: {r:?}");
        }
    }
}

#[test]
fn beacons_come_unasked_until_stopped() {
    let (ports, _) = guest();
    let control = Control::new((V4, ports.control).into(), LONG);
    for host in [V4, V6] {
        let sink = BeaconSink::bind(host).expect("a socket");
        let info = control.beacon(sink.order(200.0, 100).expect("bound")).expect("an answer");
        assert_eq!(info.running, 1);
        let mut when = Instant::now();
        for _ in 0..10 {
            when = sink.first_after(when, LONG).expect("a beacon").at;
        }
        assert_eq!(control.beacon_stop().expect("an answer").running, 0);
        let r = sink.report();
        assert!(r.received >= 10, "{r:?}");
        assert_eq!((r.lost, r.repeated, r.out_of_order), (0, 0, 0));
        // One may have been on its way.
        thread::sleep(Duration::from_millis(50));
        let after_stop = Instant::now();
        assert_eq!(sink.first_after(after_stop, Duration::from_millis(200)), None);
    }
}

#[test]
fn control_calls_do_what_they_say() {
    let (ports, ended) = guest();
    let control = Control::new((V6, ports.control).into(), LONG);
    let hello = control.wait_ready(LONG).expect("a guest");
    assert_eq!(control.hello().expect("an answer").id, hello.id);
    assert_ne!(guest().0, ports);
    assert!(control.mem().expect("an answer").available_kb > 0);

    assert!(matches!(control.verify(), Err(ControlError::Refused { .. })));
    let spec = DirtySpec { pages_per_sec: 1000, bytes_per_page: 64, order: Order::Rand, mem_mb: 1 };
    assert_eq!(control.dirty(spec).expect("an answer").pages, 256);
    let end = Instant::now() + LONG;
    while control.dirty_info().expect("an answer").written < 300 {
        assert!(Instant::now() < end, "the dirtier stands still");
    }
    let verdict = control.verify().expect("an answer");
    assert_eq!((verdict.pages, verdict.bad_pages), (256, 0));

    assert!(matches!(control.stall_read(false), Err(ControlError::Refused { .. })));
    assert!(control.stall_start(0.05).expect("an answer").running);
    assert!(control.work_start().expect("an answer").running);
    while control.work_read().expect("an answer").units == 0 {
        assert!(Instant::now() < end, "no work done");
    }
    // The meter's thread may have to wait for a CPU.
    while control.stall_read(true).expect("an answer").watched_ms == 0.0 {
        assert!(Instant::now() < end, "the meter does not run");
    }
    assert!(!control.stall_stop().expect("an answer").running);
    assert!(!control.work_stop().expect("an answer").running);

    control.poweroff().expect("an answer");
    assert_eq!(ended.recv_timeout(LONG), Ok(End::Poweroff));
    control.reboot().expect("an answer");
    assert_eq!(ended.recv_timeout(LONG), Ok(End::Reboot));
    control.crash().expect("an answer");
    assert_eq!(ended.recv_timeout(LONG), Ok(End::Crash));
}

#[test]
fn control_survives_nonsense_and_absence() {
    let (ports, _) = guest();
    let mut raw = std::net::TcpStream::connect((V4, ports.control)).expect("a connection");
    raw.write_all(b"format c:\nhello\n").expect("a connection");
    raw.shutdown(std::net::Shutdown::Write).expect("a connection");
    let mut answers = String::new();
    raw.read_to_string(&mut answers).expect("answers");
    let lines: Vec<&str> = answers.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("{\"error\":") && lines[1].starts_with("{\"ok\":"), "{answers}");

    let nobody = TcpListener::bind((V4, 0)).and_then(|l| l.local_addr()).expect("a port");
    let started = Instant::now();
    let e = Control::new(nobody, LONG).wait_ready(Duration::from_millis(300)).expect_err("nobody is there");
    assert!(e.to_string().contains(&nobody.to_string()), "{e}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn the_prober_hears_arp_and_neighbour_answers() {
    in_netns(|| {
        cable();
        let there: Mac = std::fs::read_to_string("/sys/class/net/there/address")
            .ok()
            .and_then(|a| a.trim().parse().ok())
            // sysfs shows the first namespace's devices: ask the kernel instead.
            .unwrap_or_else(|| packet::Interface::find("there").expect("the other end").mac);
        for target in ["10.99.0.2", "fd99::2"] {
            let target: IpAddr = target.parse().expect("an address");
            let p = NeighbourProber::start("here", target, Duration::from_millis(20)).expect("a packet socket");
            let mut when = Instant::now();
            for _ in 0..5 {
                let (at, mac) = p.first_answer_after(when, LONG).unwrap_or_else(|| panic!("no answer for {target}"));
                assert_eq!(mac, there);
                when = at;
            }
            let r = p.report();
            assert!(r.asked >= 5 && r.answered >= 5 && r.macs == [there.to_string()], "{r:?}");
        }
        let p = NeighbourProber::start("here", "10.99.0.77".parse().expect("an address"), Duration::from_millis(20))
            .expect("a packet socket");
        assert_eq!(p.first_answer_after(Instant::now(), Duration::from_millis(300)), None);
        assert!(p.report().asked >= 2);
        assert!(NeighbourProber::start("nowhere", target_of_nobody(), LONG).is_err());
    });
}

fn target_of_nobody() -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))
}

#[test]
fn the_sniffer_sees_every_frame_of_the_guest_and_what_it_says() {
    in_netns(|| {
        cable();
        let (here, there) = (
            packet::Interface::find("here").expect("this end"),
            packet::Interface::find("there").expect("the other end"),
        );
        let sniffer = Sniffer::start("here", there.mac).expect("a packet socket");
        let stranger = Sniffer::start("here", Mac([2, 0, 0, 0, 0, 9])).expect("a packet socket");
        let sender = packet::PacketSocket::open("there", &there).expect("a packet socket");
        let before = Instant::now();
        let send = |ethertype: u16, body: &[u8]| {
            let mut f = [here.mac.0, there.mac.0].concat();
            f.extend(ethertype.to_be_bytes());
            f.extend(body);
            sender.send(&f).expect("an interface that is up");
        };
        send(0x88b5, &[1; 50]);
        send(0x0800, &[1; 3]);
        let text = b"7 100 ...\n8 200 ...\n9 3";
        let mut tcp = vec![0x1b, 0x58, 0x30, 0x39, 0, 0, 1, 0, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0];
        tcp.extend(text);
        let mut packet = vec![0x60, 0, 0, 0, 0, u8::try_from(tcp.len()).expect("short"), 6, 64];
        packet.extend("fd99::2".parse::<Ipv6Addr>().expect("an address").octets());
        packet.extend("fd99::1".parse::<Ipv6Addr>().expect("an address").octets());
        packet.extend(&tcp);
        send(0x86dd, &packet);
        send(0x88b6, &[2; 50]);
        sniffer.wait_for(LONG, |f| f.ethertype == 0x88b6).expect("the last frame");
        let after = Instant::now();
        let capture = sniffer.stop();
        assert_eq!((capture.dropped, capture.failed.clone()), (0, None));
        let ours: Vec<&Frame> = capture
            .between(before, after)
            // The kernel's own chatter (MLD, router solicitations) aside.
            .filter(|f| !matches!(f.content, Content::Icmp6 { .. }))
            .collect();
        let types: Vec<u16> = ours.iter().map(|f| f.ethertype).collect();
        assert_eq!(types, [0x88b5, 0x0800, 0x86dd, 0x88b6], "{ours:?}");
        assert_eq!(ours[0].len, 64);
        assert_eq!(ours[1].content, Content::Other);
        let from: SocketAddr = "[fd99::2]:7000".parse().expect("an address");
        let line = |n, t_ns| Said::Counter(protocol::CounterLine { n, t_ns });
        assert_eq!(
            ours[2].content,
            Content::Tcp {
                from,
                to: "[fd99::1]:12345".parse().expect("an address"),
                seq: 256,
                flags: 0x18,
                len: text.len(),
                said: vec![line(7, 100), line(8, 200)],
            }
        );
        assert_eq!(capture.between(after, after + LONG).count(), 0);
        assert!(stranger.stop().frames.is_empty());
    });
}
