//! What others do to the buffer, and what is left after a crash.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use devices::netbuffer::{NetBuffer, NetEvent, is_sealed, leftovers, remove_leftover, seal, unseal};
use devices::{Device, DeviceSet, Ending, Kind, Policy};

use crate::Verdict;
use crate::world::{World, armed, ensure, exists, sh, unhurried};

// As `map_err` wants it.
#[allow(clippy::needless_pass_by_value)]
fn text(e: devices::netbuffer::NetError) -> String {
    e.to_string()
}

/// Three packets of a closed epoch and two of the running one are held; then `reset` happens, and three more
/// come. None of those may be released by the counters of the old queue.
async fn reset_by(reset: impl Fn(&World) -> Result<(), String>) -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    w.send(1, 3)?;
    w.held(3).await?;
    w.close(1).await?;
    w.send(2, 2)?;
    w.held(5).await?;
    reset(&w)?;
    let NetEvent::Reset { vif, .. } = w.event().await? else {
        return Err("another event than Reset".into());
    };
    ensure(vif == w.vif, || vif.clone())?;
    w.send(66, 3)?;
    w.held(3).await?;
    w.commit(1).await?;
    w.held(3).await?;
    ensure(w.observer.marks().is_empty(), || format!("leaked: {:?}", w.observer.marks()))?;
    // And the next epochs work.
    w.close(2).await?;
    w.send(3, 4)?;
    w.held(7).await?;
    w.commit(2).await?;
    w.observer.wait_for(3)?;
    w.held(4).await?;
    w.teardown(Ending::Release).await?;
    w.observer.wait_for(7)?;
    w.nothing_left()
}

pub(crate) async fn ifb_down_and_up_is_a_reset() -> Verdict {
    reset_by(|w| {
        sh(&format!("ip link set {} down", w.ifb))?;
        sh(&format!("ip link set {} up", w.ifb)).map(drop)
    })
    .await?;
    reset_by(|w| sh(&format!("ip link set {} down", w.ifb)).map(drop)).await
}

/// The release is asked for before anybody has waited for the reset to be noticed.
pub(crate) async fn release_right_after_a_reset() -> Verdict {
    for _ in 0..3 {
        let mut w = World::new()?;
        w.setup_and_arm().await?;
        w.send(1, 5)?;
        w.held(5).await?;
        w.close(1).await?;
        sh(&format!("ip link set {} down", w.ifb))?;
        sh(&format!("ip link set {} up", w.ifb))?;
        w.send(66, 5)?;
        w.commit(1).await?;
        w.send(66, 1)?;
        w.until("the last one held", || Ok(w.queue()?.0 > 0)).await?;
        ensure(w.observer.marks().is_empty(), || format!("leaked: {:?}", w.observer.marks()))?;
        w.teardown(Ending::Discard).await?;
    }
    Ok(())
}

pub(crate) async fn queue_length_change_is_a_reset() -> Verdict {
    reset_by(|w| sh(&format!("ip link set {} txqueuelen 77", w.ifb)).map(drop)).await
}

async fn foreign(w: &mut World, expect_leak: bool) -> Verdict {
    match w.event().await? {
        NetEvent::Foreign { leaked, failed: None, .. } if leaked == expect_leak => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

pub(crate) async fn foreign_plug_change_is_replaced() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    w.close(1).await?;
    sh(&format!("tc qdisc change dev {} root plug block", w.ifb))?;
    foreign(&mut w, true).await?;
    w.send(2, 3)?;
    w.held(3).await?;
    w.commit(1).await?;
    w.close(2).await?;
    w.commit(2).await?;
    w.observer.wait_for(3)?;
    w.teardown(Ending::Release).await
}

pub(crate) async fn foreign_qdisc_is_replaced() -> Verdict {
    for line in ["tc qdisc replace dev IFB root pfifo limit 9", "tc qdisc del dev IFB root"] {
        let mut w = World::new()?;
        w.setup_and_arm().await?;
        sh(&line.replace("IFB", &w.ifb))?;
        foreign(&mut w, true).await?;
        w.send(66, 3)?;
        w.held(3).await?;
        ensure(w.observer.marks().is_empty(), || format!("leaked after the repair: {:?}", w.observer.marks()))?;
        w.close(1).await?;
        w.commit(1).await?;
        w.observer.wait_for(3)?;
        w.teardown(Ending::Discard).await?;
        ensure(w.events.try_recv().is_err(), || "our own doing was reported".into())?;
    }
    Ok(())
}

pub(crate) async fn foreign_filter_removal_is_repaired() -> Verdict {
    for line in
        ["tc filter del dev VIF ingress pref 2", "tc filter del dev VIF ingress", "tc qdisc del dev VIF ingress"]
    {
        let mut w = World::new()?;
        w.setup_and_arm().await?;
        sh(&line.replace("VIF", &w.vif))?;
        foreign(&mut w, true).await.map_err(|e| format!("{line}: {e}"))?;
        w.send(66, 3)?;
        w.held(3).await?;
        ensure(w.observer.marks().is_empty(), || format!("leaked after the repair: {:?}", w.observer.marks()))?;
        w.teardown(Ending::Release).await?;
        w.nothing_left()?;
    }
    Ok(())
}

pub(crate) async fn vif_vanishes() -> Verdict {
    for ending in [Ending::Release, Ending::Discard] {
        let mut w = World::new()?;
        w.setup_and_arm().await?;
        w.send(1, 3)?;
        w.held(3).await?;
        sh(&format!("ip link delete {}", w.vif))?;
        let event = w.event().await?;
        ensure(event == NetEvent::Gone { vif: w.vif.clone(), name: w.vif.clone() }, || format!("{event:?}"))?;
        w.close(1).await?;
        w.commit(1).await?;
        w.teardown(ending).await?;
        w.teardown(ending).await?;
        ensure(w.observer.marks().is_empty(), || "a packet of a missing interface".into())?;
        w.nothing_left()?;
    }
    Ok(())
}

pub(crate) async fn ifb_vanishes() -> Verdict {
    for ending in [Ending::Release, Ending::Discard] {
        let mut w = World::new()?;
        w.setup_and_arm().await?;
        sh(&format!("ip link delete {}", w.ifb))?;
        let event = w.event().await?;
        ensure(event == NetEvent::Gone { vif: w.vif.clone(), name: w.ifb.clone() }, || format!("{event:?}"))?;
        w.send(66, 5)?;
        ensure(w.close(1).await.is_err(), || "closed an epoch without a queue".into())?;
        w.teardown(ending).await?;
        w.teardown(ending).await?;
        unseal(&w.vif).await.map_err(text)?;
        w.send(9, 1)?;
        let seen = w.observer.wait_for(1)?;
        ensure(seen.iter().all(|m| m.tag == 9), || format!("leaked: {seen:?}"))?;
        w.nothing_left()?;
    }
    Ok(())
}

pub(crate) async fn vif_comes_back_sealed() -> Verdict {
    let mut w = World::new()?;
    w.setup_and_arm().await?;
    sh(&format!("ip link delete {}", w.vif))?;
    let _gone = w.event().await?;
    w.plug_in(&w.vif.clone(), "eth0")?;
    let event = w.event().await?;
    ensure(event == NetEvent::Appeared { vif: w.vif.clone(), failed: None }, || format!("{event:?}"))?;
    ensure(is_sealed(&w.vif).await.map_err(text)?, || "not sealed".into())?;
    w.teardown(Ending::Release).await?;
    ensure(is_sealed(&w.vif).await.map_err(text)?, || "unsealed by the end of another protection".into())
}

pub(crate) async fn emulated_nic_comes_back_sealed() -> Verdict {
    let mut w = World::new()?;
    let tap = format!("{}-emu", w.vif);
    let device = w.device(&[&w.vif.clone(), &tap]);
    w.set.setup(vec![device]).await.map_err(|e| e.to_string())?;
    w.arm().await?;
    w.close(1).await?;
    w.commit(1).await?;
    w.plug_in(&tap, "eth1")?;
    let event = w.event().await?;
    ensure(event == NetEvent::Appeared { vif: tap.clone(), failed: None }, || format!("{event:?}"))?;
    ensure(is_sealed(&tap).await.map_err(text)?, || "not sealed".into())?;
    w.teardown(Ending::Release).await
}

/// The other half of the next check: protects an interface, says so, and waits for its end.
pub(crate) fn hold_until_killed(arguments: &[String]) -> ExitCode {
    let [domid, vif, until] = arguments else {
        return ExitCode::from(2);
    };
    let device = Device {
        kind: Kind::Nic,
        domid: domid.parse().unwrap_or(0),
        devid: 0,
        names: vec![vif.clone()],
        params: BTreeMap::new(),
    };
    let Ok(runtime) = tokio::runtime::Runtime::new() else {
        return ExitCode::from(2);
    };
    runtime.block_on(async {
        let (events, _inbox) = tokio::sync::mpsc::channel(100);
        let netbuffer = std::sync::Arc::new(NetBuffer::new(unhurried(), events));
        let mut set = DeviceSet::new(vec![netbuffer], Policy::strict());
        if let Err(e) = set.setup(vec![device]).await {
            println!("{e}");
            return ExitCode::from(1);
        }
        if until == "armed" && (set.arm(&armed(1)).await.is_err() || set.postsuspend(&armed(1)).await.is_err()) {
            return ExitCode::from(1);
        }
        println!("{until}");
        std::future::pending().await
    })
}

fn start_holder(w: &World, until: &str) -> Result<(std::process::Child, String), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new(program)
        .args(["hold-until-killed", &w.domid.to_string(), &w.vif, until])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut line = String::new();
    let output = child.stdout.take().ok_or("no output")?;
    BufReader::new(output).read_line(&mut line).map_err(|e| e.to_string())?;
    Ok((child, line.trim().to_owned()))
}

pub(crate) async fn leftovers_are_refused_found_and_removed_after_a_kill() -> Verdict {
    for ending in [Ending::Release, Ending::Discard] {
        let mut w = World::new()?;
        ensure(leftovers().await.map_err(text)?.is_empty(), || "something is left of another check".into())?;
        let (mut holder, said) = start_holder(&w, "armed")?;
        ensure(said == "armed", || said.clone())?;
        w.send(1, 4)?;
        w.held(4).await?;
        holder.kill().map_err(|e| e.to_string())?;
        holder.wait().map_err(|e| e.to_string())?;
        w.send(2, 3)?;
        w.held(7).await?;
        ensure(w.observer.marks().is_empty(), || "leaked after the kill".into())?;
        // A new protection does not go over what it does not know.
        let refused = w.setup().await.err().ok_or("set up over a leftover")?;
        ensure(refused.contains("remus recover"), || refused.clone())?;
        ensure(exists(&w.ifb), || "the failed set-up has removed it".into())?;
        let found = leftovers().await.map_err(text)?;
        let [left] = found.as_slice() else {
            return Err(format!("{found:?}"));
        };
        ensure(left.vif.as_ref() == Some(&w.vif) && left.ifb.as_ref() == Some(&w.ifb), || format!("{left:?}"))?;
        ensure(left.redirected && !left.sealed && left.device == Some((w.domid, 0)), || format!("{left:?}"))?;
        seal(&w.vif).await.map_err(text)?;
        w.send(66, 3)?;
        ensure(leftovers().await.map_err(text)?[0].sealed, || "the seal is not seen".into())?;
        remove_leftover(left, ending).await.map_err(text)?;
        remove_leftover(left, ending).await.map_err(text)?;
        ensure(leftovers().await.map_err(text)?.is_empty(), || "still there".into())?;
        ensure(is_sealed(&w.vif).await.map_err(text)?, || "the seal is gone".into())?;
        unseal(&w.vif).await.map_err(text)?;
        w.send(9, 1)?;
        let seen = w.observer.wait("the last", |m| m.last().is_some_and(|m| m.tag == 9))?;
        let expected: &[u32] = if ending == Ending::Release { &[1, 1, 1, 1, 2, 2, 2, 9] } else { &[9] };
        ensure(seen.iter().map(|m| m.tag).collect::<Vec<_>>() == expected, || format!("{ending:?}: {seen:?}"))?;
        w.nothing_left()?;
        w.fresh_set(unhurried());
        w.setup_and_arm().await?;
        w.teardown(Ending::Release).await?;
    }
    Ok(())
}

pub(crate) async fn leftover_that_was_never_armed() -> Verdict {
    for ending in [Ending::Release, Ending::Discard] {
        let mut w = World::new()?;
        let (mut holder, said) = start_holder(&w, "set up")?;
        ensure(said == "set up", || said.clone())?;
        holder.kill().map_err(|e| e.to_string())?;
        holder.wait().map_err(|e| e.to_string())?;
        w.send(1, 3)?;
        w.observer.wait_for(3)?;
        let found = leftovers().await.map_err(text)?;
        let [left] = found.as_slice() else {
            return Err(format!("{found:?}"));
        };
        ensure(!left.redirected && left.vif.is_none() && left.device == Some((w.domid, 0)), || format!("{left:?}"))?;
        remove_leftover(left, ending).await.map_err(text)?;
        ensure(!exists(&w.ifb), || "still there".into())?;
        w.send(2, 3)?;
        w.observer.wait_for(6)?;
        w.fresh_set(unhurried());
        w.setup().await?;
        w.teardown(Ending::Release).await?;
        w.nothing_left()?;
    }
    Ok(())
}

pub(crate) async fn seal_made_by_a_script_is_known() -> Verdict {
    let mut w = World::new()?;
    sh(&format!("tc qdisc add dev {} ingress", w.vif))?;
    sh(&format!("tc filter add dev {} ingress pref 1 protocol all matchall action drop", w.vif))?;
    ensure(is_sealed(&w.vif).await.map_err(text)?, || "not known".into())?;
    seal(&w.vif).await.map_err(text)?;
    w.setup_and_arm().await?;
    w.send(66, 3)?;
    unseal(&w.vif).await.map_err(text)?;
    w.send(1, 3)?;
    w.held(3).await?;
    w.close(1).await?;
    w.commit(1).await?;
    let seen = w.observer.wait_for(3)?;
    ensure(seen.iter().all(|m| m.tag == 1), || format!("{seen:?}"))?;
    w.teardown(Ending::Release).await?;
    w.nothing_left()
}

pub(crate) async fn seal_beside_a_clsact_of_somebody_else() -> Verdict {
    let mut w = World::new()?;
    sh(&format!("tc qdisc add dev {} clsact", w.vif))?;
    w.setup_and_arm().await?;
    w.send(1, 3)?;
    w.held(3).await?;
    w.teardown(Ending::Discard).await?;
    w.send(66, 3)?;
    unseal(&w.vif).await.map_err(text)?;
    w.send(2, 3)?;
    let seen = w.observer.wait_for(3)?;
    ensure(seen.iter().all(|m| m.tag == 2), || format!("{seen:?}"))?;
    let qdiscs = sh(&format!("tc qdisc show dev {}", w.vif))?;
    ensure(qdiscs.contains("clsact"), || "somebody else's clsact is gone".into())
}

pub(crate) async fn foreign_filter_in_our_place_is_named() -> Verdict {
    let mut w = World::new()?;
    w.setup().await?;
    sh(&format!("tc filter add dev {} ingress pref 2 protocol all matchall action pass", w.vif))?;
    let refused = w.arm().await.err().ok_or("armed over somebody else's filter")?;
    ensure(refused.contains("preference 2"), || refused.clone())?;
    w.send(0, 2)?;
    w.observer.wait_for(2)?;
    w.teardown(Ending::Release).await?;
    let filters = sh(&format!("tc filter show dev {} ingress", w.vif))?;
    ensure(filters.contains("matchall"), || "somebody else's filter is gone".into())
}
