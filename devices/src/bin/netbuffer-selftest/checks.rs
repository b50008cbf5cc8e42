//! The buffer's own work.

use std::time::{Duration, Instant};

use devices::netbuffer::{NetBufferConfig, NetEvent, PACKET_COST, PlugModel, PlugOp};
use devices::{Ending, EpochContext, OutputWatch};

use crate::Verdict;
use crate::frames::{Mark, TYPES};
use crate::world::{PATIENCE, World, armed, ensure, exists, sh, unhurried};

fn tags(marks: &[Mark]) -> Vec<u32> {
    let mut tags: Vec<u32> = marks.iter().map(|m| m.tag).collect();
    tags.dedup();
    tags
}

fn in_order(marks: &[Mark]) -> Result<(), String> {
    match marks.windows(2).find(|w| w[0].seq >= w[1].seq) {
        Some(w) => Err(format!("out of order: {:?} before {:?}", w[0], w[1])),
        None => Ok(()),
    }
}

pub(crate) async fn open_while_unarmed() -> Verdict {
    let mut w = World::new()?;
    w.setup().await?;
    w.send(0, 5)?;
    w.observer.wait_for(5)?;
    let unarmed = EpochContext { epoch: 1, armed: false };
    w.set.postsuspend(&unarmed).await.map_err(|e| e.to_string())?;
    w.send(1, 5)?;
    w.observer.wait_for(10)?;
    w.set.commit(&unarmed).await.map_err(|e| e.to_string())?;
    ensure(w.queue()?.0 == 0, || "something is held".into())?;
    ensure(w.set.postsuspend(&armed(2)).await.is_err(), || "an armed epoch without arm() was closed".into())?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn held_from_arm_on() -> Verdict {
    let mut w = World::new()?;
    w.setup().await?;
    w.send(0, 20)?;
    w.observer.wait_for(20)?;
    w.arm().await?;
    w.arm().await?;
    w.send(1, 30)?;
    w.held(30).await?;
    w.close(1).await?;
    w.send(2, 10)?;
    w.held(40).await?;
    ensure(w.observer.marks().len() == 20, || format!("leaked: {:?}", w.observer.marks()))?;
    // Without an acknowledgement nothing goes, only the sending guest's own waiting.
    w.teardown(Ending::Discard).await?;
    ensure(w.observer.marks().len() == 20, || "leaked at the end".into())
}

pub(crate) async fn every_protocol_is_held() -> Verdict {
    let mut w = World::new()?;
    w.setup().await?;
    for (i, (_, kind)) in TYPES.iter().enumerate() {
        w.send_kind(kind, i as u32, 3, 60)?;
    }
    w.observer.wait_for(3 * TYPES.len())?;
    w.observer.forget();
    w.arm().await?;
    for (i, (_, kind)) in TYPES.iter().enumerate() {
        w.send_kind(kind, i as u32, 3, 60)?;
    }
    w.held(3 * TYPES.len() as u64).await?;
    let leaked: Vec<_> = w.observer.marks().iter().map(|m| TYPES[m.tag as usize].0).collect();
    ensure(leaked.is_empty(), || format!("leaked: {leaked:?}"))?;
    w.close(1).await?;
    w.commit(1).await?;
    let seen = w.observer.wait_for(3 * TYPES.len())?;
    ensure(tags(&seen).len() == TYPES.len(), || format!("{seen:?}"))?;
    in_order(&seen)?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn release_lets_exactly_the_closed_epoch_through() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    let (mut epoch, mut seen) = (0, 0);
    for n in [5, 0, 40, 1, 300, 7] {
        epoch += 1;
        w.send(epoch, n)?;
        w.held(u64::from(n)).await?;
        w.close(u64::from(epoch)).await?;
        w.send(epoch + 1, 9)?;
        w.held(u64::from(n) + 9).await?;
        w.commit(u64::from(epoch)).await?;
        w.held(9).await?;
        let marks = w.observer.wait_for(seen + n as usize)?;
        ensure(marks.len() == seen + n as usize, || format!("epoch {epoch}: {} too many", marks.len() - seen))?;
        ensure(marks[seen..].iter().all(|m| m.tag == epoch), || format!("epoch {epoch}: {:?}", tags(&marks[seen..])))?;
        epoch += 1;
        w.close(u64::from(epoch)).await?;
        w.commit(u64::from(epoch)).await?;
        seen = w.observer.wait_for(seen + n as usize + 9)?.len();
        w.held(0).await?;
    }
    in_order(&w.observer.marks())?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn output_is_told_of_when_it_comes_not_when_it_goes() -> Verdict {
    async fn told(output: &mut OutputWatch, within: Duration) -> bool {
        tokio::time::timeout(within, output.held()).await.is_ok()
    }
    const QUIET: Duration = Duration::from_millis(300);
    let mut w = World::new()?;
    let mut output = w.telling();
    w.setup().await?;
    w.send(0, 1)?;
    w.observer.wait_for(1)?;
    ensure(!told(&mut output, QUIET).await, || "told of output that nobody holds".into())?;
    w.arm().await?;
    for epoch in 1..=4 {
        w.send(1, 1)?;
        ensure(told(&mut output, PATIENCE).await, || format!("epoch {epoch}: not told"))?;
        w.held(1).await?;
        output.close_epoch();
        w.close(epoch).await?;
        w.commit(epoch).await?;
        w.observer.wait_for(usize::try_from(epoch).unwrap_or(0) + 1)?;
        ensure(!told(&mut output, QUIET).await, || format!("epoch {epoch}: told of what was let go"))?;
    }
    w.teardown(Ending::Release).await
}

pub(crate) async fn buffer_before_release_is_refused() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    w.send(1, 5)?;
    w.held(5).await?;
    w.close(1).await?;
    w.send(2, 7)?;
    w.held(12).await?;
    let refused = w.close(2).await.err().ok_or("a second BUFFER was sent")?;
    ensure(refused.contains("out of turn"), || refused.clone())?;
    ensure(w.commit(2).await.is_err(), || "epoch 2 was released".into())?;
    w.commit(1).await?;
    let seen = w.observer.wait_for(5)?;
    w.held(7).await?;
    ensure(tags(&seen) == [1], || format!("{seen:?}"))?;
    ensure(w.commit(1).await.is_err(), || "released twice".into())?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn abandoned_epoch_goes_with_the_next() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    w.send(1, 5)?;
    w.held(5).await?;
    w.close(1).await?;
    w.set.abandon(&armed(1)).await.map_err(|e| e.to_string())?;
    w.send(2, 6)?;
    w.held(11).await?;
    w.close(2).await?;
    w.commit(2).await?;
    let seen = w.observer.wait_for(5)?;
    w.held(6).await?;
    ensure(tags(&seen) == [1], || format!("{seen:?}"))?;
    w.close(3).await?;
    w.commit(3).await?;
    w.observer.wait_for(11)?;
    in_order(&w.observer.marks())?;
    w.teardown(Ending::Release).await
}

/// Holds the model against the kernel: the same requests, sent by `tc`, in any order, also wrong ones.
pub(crate) async fn random_requests_agree_with_the_model() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    // From here on the plug is the check's: the buffer's own thread would repair it.
    w.teardown(Ending::Hold).await?;
    w.fresh_set(unhurried());
    let mut model: PlugModel<()> = PlugModel::new(64 << 20);
    let mut expected = 0;
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for step in 0..80 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let op = match random % 8 {
            0..=3 => {
                let n = (random >> 8) % 9;
                for _ in 0..n {
                    w.send(0, 1)?;
                    model.enqueue((), 60);
                }
                None
            }
            4 | 5 => Some(("block", PlugOp::Buffer)),
            6 => Some(("release", PlugOp::ReleaseOne)),
            _ if step % 3 == 0 => Some(("release_indefinite", PlugOp::ReleaseIndefinite)),
            _ => None,
        };
        if let Some((word, op)) = op {
            sh(&format!("tc qdisc change dev {} root plug {word}", w.ifb))?;
            model.apply(op);
        }
        expected += model.drain().len();
        w.held(model.len() as u64).await.map_err(|e| format!("step {step}: {e}, model {}", model.len()))?;
        let seen = w.observer.wait_for(expected)?;
        ensure(seen.len() == expected, || format!("step {step}: kernel {}, model {expected}", seen.len()))?;
    }
    in_order(&w.observer.marks())
}

pub(crate) async fn overflow_is_counted() -> Verdict {
    const LEN: u32 = 1000;
    let limit_bytes = 300_000;
    let mut model = PlugModel::with_packet_cost(limit_bytes, PACKET_COST);
    let fits = (0..100).filter(|_| model.enqueue((), LEN)).count();
    let mut w = World::with(NetBufferConfig { limit_bytes, ..unhurried() })?;
    w.setup_and_arm().await?;
    w.send_kind(crate::frames::PLAIN, 1, 100, LEN as usize)?;
    w.until("drops", || Ok(w.queue()?.2 == model.drops())).await?;
    let (held, bytes, _) = w.queue()?;
    ensure(held == fits as u64 && bytes == u64::from(model.backlog()), || {
        format!("held {held} packets, {bytes} bytes")
    })?;
    let NetEvent::Dropped { packets, .. } = w.event().await? else {
        return Err("another event than Dropped".into());
    };
    w.close(1).await?;
    w.commit(1).await?;
    let seen = w.observer.wait_for(fits)?;
    ensure(seen.len() == fits, || format!("{} came", seen.len()))?;
    in_order(&seen)?;
    w.send_kind(crate::frames::PLAIN, 2, 7, LEN as usize)?;
    w.held(7).await?;
    w.close(2).await?;
    w.set.abandon(&armed(2)).await.map_err(|e| e.to_string())?;
    w.until("the look of every second", || Ok(w.set.stats()[0].1.queued_bytes == 7 * u64::from(LEN)))
        .await
        .map_err(|e| format!("{e}: {:?}, tc {:?}", w.set.stats(), w.queue()))?;
    let stats = w.set.stats()[0].1;
    ensure(stats.dropped == model.drops() && packets <= stats.dropped, || format!("{stats:?}, event said {packets}"))?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn release_lets_held_output_flow_in_order() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    w.send(1, 500)?;
    w.held(500).await?;
    w.close(1).await?;
    w.send(2, 1500)?;
    w.held(2000).await?;
    w.teardown(Ending::Release).await?;
    let seen = w.observer.wait_for(2000)?;
    ensure(seen.len() == 2000, || format!("{} came", seen.len()))?;
    in_order(&seen)?;
    w.send(3, 5)?;
    w.observer.wait_for(2005)?;
    w.nothing_left()
}

pub(crate) async fn teardown_twice_and_everything_is_put_back() -> Verdict {
    for ending in [Ending::Release, Ending::Discard] {
        for arm in [false, true] {
            let mut w = World::new()?;
            w.setup().await?;
            if arm {
                w.arm().await?;
                w.send(1, 3)?;
                w.held(3).await?;
            }
            w.teardown(ending).await?;
            w.teardown(ending).await?;
            ensure(!exists(&w.ifb), || "the intermediate device is left".into())?;
            if ending == Ending::Discard {
                let sealed = devices::netbuffer::is_sealed(&w.vif).await.map_err(|e| e.to_string())?;
                ensure(sealed, || "not sealed".into())?;
                w.send(2, 3)?;
                devices::netbuffer::unseal(&w.vif).await.map_err(|e| e.to_string())?;
                devices::netbuffer::unseal(&w.vif).await.map_err(|e| e.to_string())?;
            }
            w.send(9, 3)?;
            let seen = w.observer.wait("the end", |m| m.last().is_some_and(|m| m.tag == 9))?;
            let leaked = seen.iter().any(|m| m.tag == 2 || (m.tag == 1 && ending == Ending::Discard));
            ensure(!leaked, || format!("leaked: {seen:?}"))?;
            w.nothing_left()?;
        }
    }
    Ok(())
}

pub(crate) async fn failed_setup_puts_everything_back() -> Verdict {
    let mut w = World::new()?;
    let mut missing = w.device(&["no-such-vif"]);
    missing.devid = 1;
    let device = w.device(&[&w.vif.clone()]);
    let error = w.set.setup(vec![device, missing]).await.err().ok_or("set up what does not exist")?;
    ensure(error.to_string().contains("no-such-vif"), || error.to_string())?;
    ensure(error.others.is_empty() && error.teardown.is_empty(), || error.to_string())?;
    w.send(1, 3)?;
    w.observer.wait_for(3)?;
    ensure(!exists(&format!("rmifb{}.1", w.domid)), || "the other one's device is left".into())?;
    w.nothing_left()
}

pub(crate) async fn two_guests_do_not_touch_each_other() -> Verdict {
    let (mut a, mut b) = (World::new()?, World::new()?);
    a.setup_and_arm().await?;
    b.setup_and_arm().await?;
    a.send(1, 4)?;
    b.send(2, 6)?;
    a.held(4).await?;
    b.held(6).await?;
    a.close(1).await?;
    a.commit(1).await?;
    a.observer.wait_for(4)?;
    b.held(6).await?;
    ensure(b.observer.marks().is_empty(), || "the other guest's output was released".into())?;
    a.teardown(Ending::Discard).await?;
    b.held(6).await?;
    b.close(1).await?;
    b.commit(1).await?;
    b.observer.wait_for(6)?;
    ensure(b.events.try_recv().is_err(), || "the other guest's changes were reported".into())?;
    b.teardown(Ending::Release).await
}

pub(crate) async fn emulated_nic_is_buffered_too() -> Verdict {
    let mut w = World::new()?;
    let tap = format!("{}-emu", w.vif);
    w.plug_in(&tap, "eth1")?;
    let emulated = w.guest.run(|| crate::frames::Sender::new("eth1"))?;
    let device = w.device(&[&w.vif.clone(), &tap]);
    w.set.setup(vec![device]).await.map_err(|e| e.to_string())?;
    w.arm().await?;
    w.send(1, 3)?;
    for seq in 1000..1004 {
        emulated.send(crate::frames::PLAIN, Mark { tag: 2, seq }, 60)?;
    }
    w.held(3).await?;
    w.close(1).await?;
    ensure(w.observer.marks().is_empty(), || format!("leaked: {:?}", w.observer.marks()))?;
    w.commit(1).await?;
    w.observer.wait_for(7)?;
    w.teardown(Ending::Release).await?;
    ensure(!exists(&format!("rmemu{}.0", w.domid)), || "the tap's device is left".into())?;
    w.nothing_left()
}

pub(crate) async fn latency_of_buffer_and_release() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    let (mut buffer, mut release) = (Vec::new(), Vec::new());
    for epoch in 1..=200 {
        let start = Instant::now();
        w.close(epoch).await?;
        buffer.push(start.elapsed());
        let start = Instant::now();
        w.commit(epoch).await?;
        release.push(start.elapsed());
    }
    for (what, times) in [("close", &mut buffer), ("release and look", &mut release)] {
        times.sort();
        println!("     {what}: median {:?}, 99th of 100 {:?}", times[100], times[198]);
    }
    w.teardown(Ending::Release).await
}
