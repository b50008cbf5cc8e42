use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::fake::Behaviour;
use super::*;
use crate::link::LostReason;

/// How far a primary gets before its link is cut.
#[derive(Clone, Copy, Debug)]
enum Cut {
    BeforeConfig,
    AfterHead,
    InEpoch(u64, usize),
    AfterEpoch(u64),
}

#[tokio::test]
async fn a_link_cut_in_any_phase_activates_nothing_and_keeps_only_an_armed_copy() {
    let mut cuts = vec![Cut::BeforeConfig, Cut::AfterHead];
    for epoch in 0..3 {
        cuts.extend([1, 2, 3].map(|parts| Cut::InEpoch(epoch, parts)));
        cuts.push(Cut::AfterEpoch(epoch));
    }
    for cut in cuts {
        let backup = Backup::new();
        let mut primary = Primary::connect(&backup, 1, offer()).await.unwrap();
        let whole = drive(&mut primary, cut).await;
        drop(primary);
        match whole {
            Some((epoch, memory)) => {
                let status = backup.reaches(State::Waiting).await;
                assert_eq!(status.whole, Some(Epoch(epoch)), "{cut:?}");
                assert_eq!(backup.host.running(NAME), None);
                backup.handle().failover(true).await.unwrap();
                assert_eq!(backup.host.running(NAME).unwrap().0, memory, "{cut:?}");
            }
            None => {
                backup.reaches(State::Discarded).await;
                assert!(backup.host.names().is_empty(), "{cut:?}");
            }
        }
    }
}

/// Epoch 0 is unarmed, later ones are armed. Returns what an activation must yield.
async fn drive(primary: &mut Primary, cut: Cut) -> Option<(u64, BTreeMap<u64, u8>)> {
    if matches!(cut, Cut::BeforeConfig) {
        return None;
    }
    primary.head().await.unwrap();
    let mut whole = None;
    let last = match cut {
        Cut::InEpoch(epoch, _) | Cut::AfterEpoch(epoch) => epoch,
        Cut::BeforeConfig | Cut::AfterHead => return None,
    };
    for epoch in 0..=last {
        let armed = epoch > 0;
        if let Cut::InEpoch(at, parts) = cut
            && at == epoch
        {
            let before = primary.memory.clone();
            primary.torn(armed, parts).await.unwrap();
            primary.memory = before;
            break;
        }
        primary.epoch(armed).await.unwrap();
        primary.acked(epoch).await;
        if armed {
            whole = Some((epoch, primary.memory.clone()));
        }
    }
    whole
}

#[tokio::test]
async fn a_receiver_that_dies_ends_acknowledging_and_its_words_are_told() {
    for die_after in 1..4 {
        let backup = Backup::new();
        backup.receivers.behave(Behaviour { die_after: Some(die_after), ..Behaviour::default() });
        let mut primary = Primary::begin(&backup).await;
        let mut acked = None;
        let text = loop {
            // The link may close under our hands: what counts is what we are told.
            let _ = primary.epoch(primary.next > 0).await;
            match primary.event().await {
                LinkEvent::Ack { epoch, .. } => acked = Some(epoch),
                LinkEvent::BackupLost { reason, text } => {
                    assert_eq!(reason, LostReason::Receiver);
                    break text;
                }
                other => panic!("{other:?}"),
            }
        };
        assert!(text.contains("SIGKILL"), "{text}");
        let status = backup.reaches(State::Discarded).await;
        assert_eq!(status.acked, acked, "nothing was acknowledged that was not sent");
        assert!(backup.host.names().is_empty(), "what a killed receiver leaves is destroyed");
    }
}

#[tokio::test]
async fn a_receiver_that_hangs_ends_acknowledging() {
    let backup = Backup::new();
    // The first copy is one PAGE_DATA record per frame: 200 pages in 4 of them.
    backup.receivers.behave(Behaviour { hang_after: Some(5), ..Behaviour::default() });
    let mut primary = Primary::begin(&backup).await;
    let mut acked = 0;
    let late = loop {
        primary.epoch(primary.next > 0).await.unwrap();
        match primary.event().await {
            LinkEvent::Ack { .. } => acked += 1,
            LinkEvent::AckLate(late) => break late,
            other => panic!("{other:?}"),
        }
        assert!(acked < 10, "F11: a receiver that reads nothing is acknowledged for ever");
    };
    assert_eq!(late.epoch.0, acked);
    // A stop still works: the receiver is killed and its domain destroyed.
    primary.sender.stop(crate::link::StopReason::Planned).unwrap();
    assert_eq!(primary.event().await, LinkEvent::Stopped);
    assert!(backup.host.names().is_empty());
}

#[tokio::test]
async fn a_copy_that_somebody_destroys_is_noticed_before_the_next_acknowledgement() {
    let backup = Backup::new();
    // The receiver takes in epochs 0 and 1 (4 and 2 frames) and then looks at nothing any more, so only we can notice.
    backup.receivers.behave(Behaviour { hang_after: Some(6), ..Behaviour::default() });
    let mut primary = Primary::armed(&backup).await;
    backup.handle().watch().wait_for(|status| status.backlog_epochs == 0).await.unwrap();
    // What is drained may not be applied yet.
    tokio::time::timeout(Duration::from_secs(10), backup.host.applied(DomId(1), 100, 2)).await.unwrap();
    backup.host.remove(DomId(1));
    primary.epoch(true).await.unwrap();
    match primary.event().await {
        LinkEvent::BackupLost { reason: LostReason::Receiver, text } => {
            assert!(text.contains("web--incoming"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_epoch_over_the_staging_limit_is_told_and_the_last_good_copy_kept() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    let expected = primary.memory.clone();
    primary.sender.epoch_begin(Epoch(2), true).await.unwrap();
    let batch = PageBatch { entries: (0..400).collect(), data: vec![9; 400 * PAGE_SIZE].into() };
    // The backup closes while we send.
    let _ = primary.sender.pages(Epoch(2), batch).await;
    match primary.event().await {
        LinkEvent::BackupLost { reason: LostReason::Memory, text } => assert!(text.contains("1 MiB"), "{text}"),
        other => panic!("{other:?}"),
    }
    backup.reaches(State::Waiting).await;
    backup.handle().failover(true).await.unwrap();
    assert_eq!(backup.host.running(NAME).unwrap().0, expected);
}

#[tokio::test]
async fn a_configuration_of_another_domain_is_refused() {
    let backup = Backup::new();
    let mut primary = Primary::connect(&backup, 1, offer()).await.unwrap();
    primary.sender.config(fake::config("other", UUID)).await.unwrap();
    primary.sender.preamble(fake::preamble()).await.unwrap();
    match primary.event().await {
        LinkEvent::BackupLost { text, .. } => assert!(text.contains("\"other\""), "{text}"),
        other => panic!("{other:?}"),
    }
}

/// A byte that is flipped anywhere on the way ends the session; what can be activated afterwards is a whole epoch or nothing.
#[tokio::test]
async fn a_corrupted_stream_never_reaches_the_copy() {
    // Every epoch's memory, by epoch, as an undamaged primary has it.
    let mut step = 0;
    for at in (100..1_100_000).step_by(65_521) {
        step += 1;
        let backup = Backup::new();
        let (ours, near) = duplex(1 << 16);
        let (far, theirs) = duplex(1 << 16);
        tokio::spawn(flip(near, far, at, 1 << (step % 8)));
        let connected = Primary::over(&backup, 1, offer(), Connection::new(ours), Connection::new(theirs)).await;
        let Ok(mut primary) = connected else { continue };
        let mut memories = Vec::new();
        if primary.head().await.is_ok() {
            while memories.len() < 5 && primary.epoch(!memories.is_empty()).await.is_ok() {
                memories.push(primary.memory.clone());
                if !matches!(primary.event().await, LinkEvent::Ack { .. }) {
                    break;
                }
            }
        }
        drop(primary);
        let mut status = backup.handle().watch();
        let end = status.wait_for(|s| matches!(s.state, State::Waiting | State::Discarded)).await.unwrap().clone();
        if end.state == State::Waiting {
            let epoch = backup.handle().failover(true).await.unwrap().epoch;
            assert!(end.acked.is_none_or(|acked| acked <= epoch));
            assert_eq!(backup.host.running(NAME).unwrap().0, memories[epoch.0 as usize], "flipped at {at}");
        } else {
            assert!(backup.host.names().is_empty());
        }
    }
}

/// Carries bytes both ways and flips bits of one byte of those that go far.
async fn flip(near: tokio::io::DuplexStream, far: tokio::io::DuplexStream, at: usize, bits: u8) {
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let forth = async {
        let mut sent = 0;
        let mut buffer = vec![0; 8192];
        while let Ok(read @ 1..) = near_read.read(&mut buffer).await {
            if (sent..sent + read).contains(&at) {
                buffer[at - sent] ^= bits;
            }
            sent += read;
            if far_write.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
        let _ = far_write.shutdown().await;
    };
    let back = async {
        let _ = tokio::io::copy(&mut far_read, &mut near_write).await;
        let _ = near_write.shutdown().await;
    };
    tokio::join!(forth, back);
}
