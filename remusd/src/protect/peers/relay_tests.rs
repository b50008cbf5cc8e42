//! What a primary is told of a link that ends: whole sessions over a pipe.

use std::time::Duration;

use tokio::sync::mpsc;

use super::link::relay;
use super::sleep::Sleep;
use crate::ids::{Generation, Nonce, SessionKey};
use crate::link::handshake::Incoming;
use crate::link::transport::Connection;
use crate::link::{LinkOptions, PrimaryLink, ProtectOffer};
use crate::protect::peer::PeerEvent;

const DETECTION: Duration = Duration::from_secs(1);

/// The last thing that is told when the backup's end closes after the primary has slept for so long.
async fn end_after(sleep: Duration, answer: Option<&'static str>) -> PeerEvent {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let options = LinkOptions::for_detection(DETECTION);
    let key = SessionKey { generation: Generation(1), nonce: Nonce(uuid::Uuid::from_u128(3)) };
    let accept = async {
        let incoming = Incoming::accept(Connection::new(theirs), options.handshake_timeout).await.unwrap();
        incoming.welcome(uuid::Uuid::nil(), false, &options).await.unwrap()
    };
    let (opened, session) =
        tokio::join!(PrimaryLink::over(Connection::new(ours), "b", key, ProtectOffer::example(), &options), accept);
    let (sender, events) = opened.unwrap();
    let (send, mut told) = mpsc::unbounded_channel();
    let slept = Sleep::new(DETECTION, tokio::time::Instant::now().into_std());
    tokio::spawn(relay(events, send, slept, async move || answer.map(str::to_owned)));
    tokio::time::sleep(DETECTION * 3).await;
    // The other end goes without a word; this host's timers stand still meanwhile.
    drop(session);
    tokio::time::advance(sleep).await;
    let mut last = None;
    while let Ok(Some(event)) = tokio::time::timeout(DETECTION * 5, told.recv()).await {
        last = Some(event);
    }
    drop(sender);
    last.expect("a link that has ended is told")
}

#[tokio::test(start_paused = true)]
async fn who_has_slept_asks_before_it_takes_the_backup_for_lost() {
    let sleep = DETECTION * 100;
    assert!(matches!(end_after(sleep, Some("b runs it")).await, PeerEvent::Superseded(text) if text == "b runs it"));
    assert!(matches!(end_after(sleep, None).await, PeerEvent::Lost(_)));
}

#[tokio::test(start_paused = true)]
async fn who_was_awake_does_not_ask() {
    assert!(matches!(end_after(Duration::ZERO, Some("not asked for")).await, PeerEvent::Lost(_)));
}
