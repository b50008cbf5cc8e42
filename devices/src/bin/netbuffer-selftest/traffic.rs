//! Real protocols, and the endings under a flood.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use devices::Ending;
use devices::netbuffer::{is_sealed, seal, unseal};

use crate::Verdict;
use crate::frames::{Mark, PLAIN, Sender};
use crate::world::{PATIENCE, World, ensure, exists, sh};

fn host_addresses(w: &World) -> [SocketAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd09, u16::from_str_radix(&w.domid.to_string(), 16).unwrap_or(0), 0, 0, 0, 0, 0, 1);
    [SocketAddr::from(([10, 9, w.domid as u8, 1], 0)), SocketAddr::from((v6, 0))]
}

fn no_data<T>(result: std::io::Result<T>) -> Result<(), String> {
    match result {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => Ok(()),
        Err(e) => Err(e.to_string()),
        Ok(_) => Err("it came through".into()),
    }
}

/// A datagram and a connection attempt from the guest, held and released, over both IP versions.
pub(crate) async fn udp_and_tcp_over_ipv4_and_ipv6() -> Verdict {
    let mut w = World::new()?;
    w.enable_ipv6()?;
    w.setup().await?;
    let text = |e: std::io::Error| e.to_string();
    let mut epoch = 0;
    for address in host_addresses(&w) {
        let udp = UdpSocket::bind(address).map_err(|e| format!("{address}: {e}"))?;
        let tcp = TcpListener::bind(address).map_err(text)?;
        tcp.set_nonblocking(true).map_err(text)?;
        let (udp_to, tcp_to) = (udp.local_addr().map_err(text)?, tcp.local_addr().map_err(text)?);
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let from = w.guest.run(move || UdpSocket::bind(any)).map_err(text)?;
        // While unarmed it flows; this also resolves the neighbours.
        let mut buffer = [0; 64];
        udp.set_read_timeout(Some(PATIENCE)).map_err(text)?;
        if epoch == 0 {
            from.send_to(b"open", udp_to).map_err(text)?;
            udp.recv(&mut buffer).map_err(|e| format!("{address}, unarmed: {e}"))?;
        }
        w.arm().await?;
        let before = w.queue()?.0;
        from.send_to(b"held", udp_to).map_err(text)?;
        let connecting = w.guest.run(move || std::thread::spawn(move || TcpStream::connect_timeout(&tcp_to, PATIENCE)));
        w.until("datagram and SYN held", || Ok(w.queue()?.0 >= before + if epoch == 0 { 2 } else { 1 })).await?;
        udp.set_read_timeout(Some(Duration::from_millis(100))).map_err(text)?;
        no_data(udp.recv(&mut buffer)).map_err(|e| format!("UDP to {address}: {e}"))?;
        no_data(tcp.accept()).map_err(|e| format!("TCP to {address}: {e}"))?;
        // An acknowledged epoch each for the neighbour, the SYN and the last part of the handshake.
        udp.set_read_timeout(Some(Duration::from_millis(20))).map_err(text)?;
        let (mut got_udp, mut accepted) = (false, false);
        for _ in 0..500 {
            epoch += 1;
            w.close(epoch).await?;
            w.commit(epoch).await?;
            got_udp = got_udp || udp.recv(&mut buffer).is_ok();
            accepted = accepted || tcp.accept().is_ok();
            if got_udp && accepted {
                break;
            }
        }
        ensure(got_udp, || format!("UDP to {address} never arrived"))?;
        ensure(accepted, || format!("TCP to {address} was never accepted"))?;
        ensure(connecting.join().is_ok_and(|c| c.is_ok()), || "the guest did not connect".into())?;
    }
    w.teardown(Ending::Release).await
}

/// Half a megabyte from the guest arrives whole through epochs of a few milliseconds.
pub(crate) async fn tcp_flows_through_epochs() -> Verdict {
    const SIZE: usize = 512 << 10;
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    let text = |e: std::io::Error| e.to_string();
    let listener = TcpListener::bind(host_addresses(&w)[0]).map_err(text)?;
    let to = listener.local_addr().map_err(text)?;
    let byte = |i: usize| (i % 251) as u8;
    let sending = w.guest.run(move || {
        std::thread::spawn(move || {
            let data: Vec<u8> = (0..SIZE).map(byte).collect();
            TcpStream::connect_timeout(&to, PATIENCE)?.write_all(&data)
        })
    });
    let receiving = std::thread::spawn(move || {
        let mut data = Vec::new();
        listener.accept()?.0.read_to_end(&mut data)?;
        std::io::Result::Ok(data)
    });
    let mut epoch = 0;
    while !receiving.is_finished() {
        epoch += 1;
        w.close(epoch).await?;
        tokio::time::sleep(Duration::from_millis(2)).await;
        w.commit(epoch).await?;
    }
    sending.join().map_err(|_| "sender panicked")?.map_err(text)?;
    let data = receiving.join().map_err(|_| "receiver panicked")?.map_err(text)?;
    ensure(data.len() == SIZE && data.iter().enumerate().all(|(i, b)| *b == byte(i)), || {
        format!("{} of {SIZE} bytes, or changed", data.len())
    })?;
    w.teardown(Ending::Release).await
}

/// The host asks for the guest's address; the answer waits for its epoch.
pub(crate) async fn arp_reply_is_held() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    let (domid, bridge) = (w.domid, w.bridge.clone());
    let to: SocketAddr = ([10, 9, domid as u8, 2], 4444).into();
    let guest = w.guest.run(move || UdpSocket::bind(to)).map_err(|e| e.to_string())?;
    let host = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    host.send_to(b"who has", to).map_err(|e| e.to_string())?;
    w.until("an ARP reply held", || Ok(w.queue()?.0 > 0)).await?;
    let known = || Ok(sh(&format!("ip neigh show 10.9.{domid}.2 dev {bridge}"))?.contains("lladdr"));
    ensure(!known()?, || "the host knows the guest's address".into())?;
    w.close(1).await?;
    w.commit(1).await?;
    w.until("the address is known", known).await?;
    guest.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
    guest.recv(&mut [0; 16]).map_err(|e| e.to_string())?;
    w.teardown(Ending::Release).await
}

/// A guest that never stops sending. Each frame is marked with what `tag` is when it is sent.
struct Flood {
    tag: Arc<AtomicU32>,
    sent: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    /// `pause` between bursts of ten.
    fn start(sender: &Arc<Sender>, pause: Duration) -> Self {
        let (tag, sent, stop) =
            (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (sender, marks, count, stopped) = (sender.clone(), tag.clone(), sent.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                for _ in 0..10 {
                    let mark = Mark { tag: marks.load(Ordering::SeqCst), seq: count.load(Ordering::SeqCst) };
                    // ENOBUFS: the interface is going; the next one will do.
                    if sender.send(PLAIN, mark, 60).is_ok() {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                }
                std::thread::sleep(pause);
            }
        });
        Self { tag, sent, stop, thread: Some(thread) }
    }

    /// Frames begun from here on are marked with `tag`. Returns once none of those before is on its way into
    /// the interface.
    async fn mark(&self, tag: u32) {
        self.tag.store(tag, Ordering::SeqCst);
        self.more(11).await;
    }

    /// Waits until `n` more are sent.
    async fn more(&self, n: u32) {
        let until = self.sent.load(Ordering::SeqCst) + n;
        while self.sent.load(Ordering::SeqCst) < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn stop(&mut self) -> u32 {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop();
    }
}

const NEVER_SEEN: u32 = 66;

fn leaks(w: &World) -> usize {
    w.observer.marks().iter().filter(|m| m.tag == NEVER_SEEN).count()
}

pub(crate) async fn discard_never_leaks_under_a_flood() -> Verdict {
    for round in 0..3u64 {
        let mut w = World::new()?;
        let mut flood = Flood::start(&w.sender, Duration::from_micros(200));
        w.setup().await?;
        flood.more(200).await;
        w.arm().await?;
        // Some epochs go well; the frames after the last BUFFER are never acknowledged.
        for epoch in 1..=round {
            w.close(epoch).await?;
            flood.more(30).await;
            w.commit(epoch).await?;
        }
        if round > 0 {
            w.close(round + 1).await?;
        }
        flood.mark(NEVER_SEEN).await;
        if round > 0 {
            w.commit(round + 1).await?;
        }
        flood.more(500).await;
        ensure(leaks(&w) == 0, || format!("round {round}: {} before the end", leaks(&w)))?;
        w.teardown(Ending::Discard).await?;
        ensure(!exists(&w.ifb), || "the intermediate device is left".into())?;
        flood.more(1000).await;
        w.teardown(Ending::Discard).await?;
        flood.more(200).await;
        ensure(leaks(&w) == 0, || format!("round {round}: {} at or after the end", leaks(&w)))?;
        flood.mark(3).await;
        unseal(&w.vif).await.map_err(|e| e.to_string())?;
        w.observer.wait("after unsealing", |m| m.last().is_some_and(|m| m.tag == 3))?;
        flood.stop();
        w.nothing_left()?;
    }
    Ok(())
}

pub(crate) async fn release_loses_nothing_under_a_flood() -> Verdict {
    let mut w = World::new()?;
    let mut flood = Flood::start(&w.sender, Duration::from_millis(2));
    w.setup_and_arm().await?;
    for epoch in 1..=5 {
        flood.more(50).await;
        w.close(epoch).await?;
        w.commit(epoch).await?;
    }
    flood.more(500).await;
    w.teardown(Ending::Release).await?;
    flood.more(100).await;
    let sent = flood.stop();
    let seen = w.observer.wait_for(sent as usize)?;
    let mut numbers: Vec<u32> = seen.iter().map(|m| m.seq).collect();
    let overtaken = numbers.windows(2).filter(|w| w[0] > w[1]).count();
    numbers.sort_unstable();
    ensure(numbers == (0..sent).collect::<Vec<_>>(), || format!("{sent} sent, {} seen", seen.len()))?;
    // Where the redirect ends a frame may overtake those still in the device: once, not more.
    ensure(overtaken <= 1, || format!("out of order in {overtaken} places"))?;
    w.nothing_left()
}

pub(crate) async fn seal_and_unseal_under_a_flood() -> Verdict {
    let mut w = World::new()?;
    let mut flood = Flood::start(&w.sender, Duration::from_micros(500));
    let text = |e: devices::netbuffer::NetError| e.to_string();
    // On its own.
    flood.more(50).await;
    seal(&w.vif).await.map_err(text)?;
    seal(&w.vif).await.map_err(text)?;
    ensure(is_sealed(&w.vif).await.map_err(text)?, || "not sealed".into())?;
    flood.mark(NEVER_SEEN).await;
    flood.more(500).await;
    flood.mark(2).await;
    unseal(&w.vif).await.map_err(text)?;
    ensure(!is_sealed(&w.vif).await.map_err(text)?, || "still sealed".into())?;
    w.observer.wait("after unsealing", |m| m.last().is_some_and(|m| m.tag == 2))?;
    w.nothing_left()?;
    // Together with a buffer: setting up, arming and both endings below a seal.
    seal(&w.vif).await.map_err(text)?;
    flood.mark(NEVER_SEEN).await;
    w.setup_and_arm().await?;
    flood.more(200).await;
    ensure(w.queue()?.0 == 0, || "what a seal should drop is held".into())?;
    unseal(&w.vif).await.map_err(text)?;
    flood.more(200).await;
    ensure(w.queue()?.0 > 0, || "unsealed, but nothing is held".into())?;
    seal(&w.vif).await.map_err(text)?;
    w.teardown(Ending::Discard).await?;
    flood.more(500).await;
    ensure(leaks(&w) == 0, || format!("{} leaked", leaks(&w)))?;
    ensure(is_sealed(&w.vif).await.map_err(text)?, || "not sealed at the end".into())?;
    flood.stop();
    ensure(seal("no-such-vif").await.is_err(), || "sealed what does not exist".into())
}
