"""Operations with a plain reference beside each fast provider."""
