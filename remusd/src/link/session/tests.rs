use bytes::Bytes;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::writer::heartbeat;
use super::*;
use crate::{
    ids::{Generation, Nonce, SessionKey},
    link::{
        FrameError, StopReason,
        codec::{Decoder, Encoder},
        frame::{ErrorCode, LostReason},
    },
    stream::PageBatch,
};

const DETECTION: Duration = Duration::from_millis(1000);

fn key() -> SessionKey {
    SessionKey { generation: Generation(1), nonce: Nonce(uuid::Uuid::from_u128(9)) }
}

fn start(stream: DuplexStream, options: &LinkOptions) -> Session {
    Session::start(Connection::new(stream), Encoder::new(key()), Decoder::new(key()), None, options)
}

fn options() -> LinkOptions {
    LinkOptions { data_queue: 64 * 1024, ..LinkOptions::for_detection(DETECTION) }
}

/// The other end by hand: what arrives, and bytes to send.
struct Peer {
    stream: DuplexStream,
    decoder: Decoder,
    encoder: Encoder,
}

impl Peer {
    fn pair(pipe: usize, options: &LinkOptions) -> (Session, Self) {
        let (ours, theirs) = duplex(pipe);
        let peer = Self { stream: theirs, decoder: Decoder::new(key()), encoder: Encoder::new(key()) };
        (start(ours, options), peer)
    }

    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            if self.stream.read_buf(self.decoder.buffer()).await.unwrap() == 0 {
                self.decoder.finish().unwrap();
                return None;
            }
        }
    }

    async fn next_not_heartbeat(&mut self) -> Option<Frame> {
        loop {
            match self.next().await {
                Some(Frame::Heartbeat(_)) => {}
                frame => return frame,
            }
        }
    }

    async fn send(&mut self, frame: &Frame) {
        let mut bytes = BytesMut::new();
        self.encoder.encode(frame, &mut bytes).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
    }
}

fn pages(epoch: u64, count: u64) -> (Frame, usize) {
    let batch = PageBatch {
        entries: (0..count).collect(),
        data: Bytes::from(vec![7; count as usize * crate::stream::PAGE_SIZE]),
    };
    let size = batch.size();
    let epoch = Epoch(epoch);
    (Frame::Pages { epoch, batch }, size)
}

async fn next_frame(session: &mut Session) -> Frame {
    loop {
        match session.events.recv().await {
            Some(SessionEvent::Frame(frame)) => return frame,
            Some(_) => {}
            None => panic!("the session has ended"),
        }
    }
}

async fn next_not_heartbeat(session: &mut Session) -> Option<SessionEvent> {
    loop {
        match session.events.recv().await {
            Some(SessionEvent::Frame(Frame::Heartbeat(_))) => {}
            event => return event,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn control_goes_before_waiting_pages_and_data_waits_for_room() {
    let (session, mut peer) = Peer::pair(4096, &options());
    let outbox = session.outbox.clone();
    let sender = tokio::spawn(async move {
        for epoch in 0..20 {
            let (frame, size) = pages(epoch, 4);
            outbox.data(frame, size).await.unwrap();
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!sender.is_finished(), "20 * 16 KiB do not fit into 64 KiB");
    let stop = Frame::Stop { reason: StopReason::Planned };
    session.outbox.control(stop.clone()).unwrap();
    let mut before = 0;
    loop {
        match peer.next_not_heartbeat().await.unwrap() {
            frame if frame == stop => break,
            _ => before += 1,
        }
    }
    assert!(before <= 1, "only the frame in flight may go before, {before} did");
    for _ in before..20 {
        assert!(matches!(peer.next_not_heartbeat().await, Some(Frame::Pages { .. })));
    }
    sender.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn heartbeats_carry_the_newest_report_and_keep_the_peer_from_suspecting() {
    let (ours, theirs) = duplex(1 << 16);
    let (a, mut b) = (start(ours, &options()), start(theirs, &options()));
    a.outbox.report(Report { epoch: Epoch(6), guest: GuestState::Running, resumed_at: Some(Instant::now()) });
    let deadline = Instant::now() + 10 * DETECTION;
    let mut beats = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout_at(deadline, b.events.recv()).await {
        match event {
            SessionEvent::Frame(Frame::Heartbeat(beat)) => beats.push(beat),
            other => panic!("{other:?}"),
        }
    }
    assert!(beats.len() >= 45, "{} in ten seconds", beats.len());
    let last = beats.last().unwrap();
    assert_eq!((last.epoch, last.guest), (Epoch(6), GuestState::Running));
    assert!(last.since_resume_ms > 9_000 && !last.late);
}

#[tokio::test(start_paused = true)]
async fn silence_is_suspected_once_and_forgiven() {
    let (mut session, mut peer) = Peer::pair(1 << 20, &options());
    let before = Instant::now();
    let Some(SessionEvent::Suspect { silence }) = session.events.recv().await else { panic!("no suspicion") };
    assert!(silence >= DETECTION && before.elapsed() < DETECTION * 5 / 4);
    peer.send(&Frame::Stopped).await;
    assert_eq!(session.events.recv().await, Some(SessionEvent::Alive));
    assert_eq!(session.events.recv().await, Some(SessionEvent::Frame(Frame::Stopped)));
}

/// The heartbeats that came while this host was frozen say that it was silent: no sign of a link that carries one way only. Those that
/// come once it has been awake for that long are one.
#[tokio::test(start_paused = true)]
async fn what_the_peer_missed_in_our_freeze_is_not_laid_to_the_link() {
    let (mut session, mut peer) = Peer::pair(1 << 16, &options());
    tokio::time::sleep(2 * DETECTION).await;
    let silent = |ms: u64| Frame::Heartbeat(heartbeat(Report::default(), false, Duration::from_millis(ms)));
    peer.send(&silent(5000)).await;
    peer.send(&silent(5100)).await;
    // The timers of this host come ten seconds late.
    tokio::time::advance(10 * DETECTION).await;
    for _ in 0..2 {
        match next_frame(&mut session).await {
            Frame::Heartbeat(beat) => assert_eq!(beat.heard_ms, 0),
            other => panic!("{other:?}"),
        }
    }
    let mut heard = 0;
    for _ in 0..20 {
        tokio::time::sleep(DETECTION / 10).await;
        peer.send(&silent(15_000)).await;
        let Frame::Heartbeat(beat) = next_frame(&mut session).await else { panic!("a heartbeat was sent") };
        assert!(beat.heard_ms >= heard, "{} after {heard}", beat.heard_ms);
        heard = beat.heard_ms;
    }
    assert!(heard >= 1500, "a peer that hears nothing for two detection times is believed: {heard}");
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_holds_us_up_does_not_make_the_peer_suspect() {
    let (mut session, mut peer) = Peer::pair(1 << 16, &options());
    let feeder = tokio::spawn(async move {
        for epoch in 0..200 {
            peer.send(&pages(epoch, 8).0).await;
        }
        peer
    });
    tokio::time::sleep(5 * DETECTION).await;
    assert!(!feeder.is_finished(), "reading goes on only as fast as events are taken");
    for epoch in 0..200 {
        match session.events.recv().await.unwrap() {
            SessionEvent::Frame(Frame::Pages { epoch: got, .. }) => assert_eq!(got, Epoch(epoch)),
            other => panic!("{other:?}"),
        }
    }
    feeder.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unacknowledged_epoch_is_told_although_the_peer_talks() {
    let (mut session, mut peer) = Peer::pair(1 << 16, &options());
    let end = crate::link::EpochEnd {
        epoch: Epoch(3),
        armed: true,
        digest: crate::stream::digest::EpochDigest(0),
        pages: 0,
        bytes: 0,
        records: 0,
    };
    session.outbox.data(Frame::EpochEnd(end), 0).await.unwrap();
    tokio::spawn(async move {
        loop {
            peer.send(&Frame::Heartbeat(heartbeat(Report::default(), false, Duration::ZERO))).await;
            tokio::time::sleep(DETECTION / 10).await;
        }
    });
    match next_not_heartbeat(&mut session).await {
        Some(SessionEvent::AckLate(late)) => assert_eq!(late.epoch, Epoch(3)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn closing_writes_what_control_is_queued_and_ends_both_ends() {
    let (mut session, mut peer) = Peer::pair(1 << 20, &options());
    let lost = Frame::BackupLost { reason: LostReason::Receiver, text: "gone".into() };
    session.outbox.control(lost.clone()).unwrap();
    session.outbox.close();
    assert_eq!(peer.next_not_heartbeat().await, Some(lost));
    assert_eq!(peer.next_not_heartbeat().await, None);
    assert_eq!(next_not_heartbeat(&mut session).await, Some(SessionEvent::Closed(CloseReason::Local)));
    assert_eq!(session.events.recv().await, None);
    assert!(session.outbox.control(Frame::Stopped).is_err());
    assert!(session.outbox.data(Frame::Stopped, 1).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn how_the_stream_ended_is_told() {
    let closed = async |mut session: Session| match next_not_heartbeat(&mut session).await {
        Some(SessionEvent::Closed(reason)) => reason,
        other => panic!("{other:?}"),
    };

    let (session, peer) = Peer::pair(1 << 20, &options());
    drop(peer);
    assert_eq!(closed(session).await, CloseReason::Eof);

    let (session, mut peer) = Peer::pair(1 << 20, &options());
    peer.stream.write_all(b"RMUS").await.unwrap();
    drop(peer);
    assert_eq!(closed(session).await, CloseReason::Protocol(FrameError::Truncated));

    let (session, mut peer) = Peer::pair(1 << 20, &options());
    peer.stream.write_all(&[0; 60]).await.unwrap();
    assert!(matches!(closed(session).await, CloseReason::Protocol(FrameError::Magic { .. })));

    let (session, mut peer) = Peer::pair(1 << 20, &options());
    peer.send(&Frame::Error { code: ErrorCode::Internal, text: "disk full".into() }).await;
    drop(peer);
    assert_eq!(closed(session).await, CloseReason::Peer { code: ErrorCode::Internal, text: "disk full".into() });
}

#[tokio::test(start_paused = true)]
async fn a_waiting_sender_is_freed_when_the_session_ends() {
    let (session, peer) = Peer::pair(4096, &options());
    let outbox = session.outbox.clone();
    let sender = tokio::spawn(async move {
        loop {
            let (frame, size) = pages(0, 8);
            if outbox.data(frame, size).await.is_err() {
                return;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(peer);
    sender.await.unwrap();
    drop(session);
}
